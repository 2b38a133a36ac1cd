"""What is recorded of arms while they train: metrics, checkpoints, divergence."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from vsae_jax import runs
from vsae_jax.autoencoder.penalties import PENALTIES
from vsae_jax.autoencoder.sparsity import dead_latents
from vsae_jax.system import mesh, processes
from vsae_jax.system.errors import UserError
from vsae_jax.training import loggers, optimizer
from vsae_jax.training.checkpoint import Checkpoints
from vsae_jax.training.groups import Group, member, states
from vsae_jax.training.plan import PlannedRun
from vsae_jax.training.step import Numbers, TrainState, zero_totals


class Watch:
    """Logs and saves arms that train together.

    jobs: the arms' runs, by place. diverged: the names of those whose loss was not
    finite, which are no longer recorded. shown: the last interval's main numbers.
    """

    def __init__(
        self,
        jobs: Sequence[PlannedRun],
        saves: Mapping[Path, Checkpoints],
        *,
        step: int,
    ):
        self.jobs, self._saves = jobs, saves
        self.diverged: list[str] = []
        self.shown: dict[str, float | str] = {}
        self._loggers = [loggers.open_loggers(job.train, job.folder) for job in jobs]
        self._last_step, self._last = step, time.monotonic()

    @property
    def folder(self) -> Path:
        """The run's folder; for a grid, the folder above its arms."""
        first = self.jobs[0].folder
        return first if len(self.jobs) == 1 else first.parent

    def log(self, groups: Sequence[Group], step: int) -> list[Group]:
        """Writes each arm's line after one device read; returns the groups with their
        sums set to zero."""
        read = jax.device_get([_readings(group) for group in groups])
        lines = {}
        for group, (totals, dead, numbers) in zip(groups, read, strict=True):
            for i, place in enumerate(group.arms):
                arm = member((totals, dead, numbers), i, len(group.arms))
                if self._is_finite(place, arm[0]):
                    lines[place] = _metrics(*arm, step=step)
        rate = self._rate(step)
        for place, line in lines.items():
            line["rows_per_second"] = rate
            for log in self._loggers[place]:
                log.write(step, line)
        self.shown = _shown(list(lines.values()))
        return [g._replace(state=_without_totals(g.state)) for g in groups]

    def save(self, groups: Sequence[Group], step: int) -> None:
        """Writes a checkpoint of each arm whose loss is finite."""
        for place, state in states(groups).items():
            job = self.jobs[place]
            if self._is_finite(place, jax.device_get(state.totals)):
                position = step * job.train.batch_size
                self._saves[job.folder].save(state, data_position=position)

    def close(self) -> None:
        """Closes the logs."""
        for log in (log for logs in self._loggers for log in logs):
            log.close()

    def _rate(self, step: int) -> float:
        """Rows per second of one arm since the last line."""
        now = time.monotonic()
        seconds, self._last = max(now - self._last, 1e-9), now
        steps, self._last_step = step - self._last_step, step
        return steps * self.jobs[0].train.batch_size / seconds

    def _is_finite(self, place: int, totals: Any) -> bool:
        """Whether an arm's loss is finite. A single run whose loss is not raises; an
        arm of a grid is left out from then on."""
        job, bad = self.jobs[place], int(totals.bad_step)
        if bad < 0:
            return job.folder.name not in self.diverged
        if not (job.folder.parent / runs.GRID).is_file():
            saved = self._saves[job.folder].steps()
            good = f"step {saved[-1]} is saved" if saved else "nothing was saved before"
            raise UserError(
                f"the loss is not finite at step {bad}; {good}; try a lower --lr, a "
                "smaller --beta or --dtype=float32 with another --out"
            )
        if job.folder.name not in self.diverged:
            self.diverged.append(job.folder.name)
            if processes.first():
                runs.write_json(job.folder / runs.DIVERGED, {"step": bad})
            print(f"{job.folder.name}: the loss is not finite at step {bad}; left out")
        return False


def _readings(group: Group) -> tuple[Any, Any, Numbers]:
    """What a line needs: sums, share of dead latents and numbers of a group's arms."""
    state, numbers = group.state, group.numbers
    dead = _dead_share(state.rows_since_fired, numbers["dead_after_tokens"])
    return state.totals, dead, numbers


@jax.jit
def _dead_share(rows_since_fired: Array, limit: Array) -> Array:
    limit = jnp.expand_dims(limit, -1)
    return jnp.mean(dead_latents(rows_since_fired, limit), axis=-1)


def _metrics(
    totals: Any, dead: Any, numbers: Numbers, *, step: int
) -> dict[str, float]:
    """The interval's means, and the schedules at its last step."""
    n = int(totals.steps)
    mean = {name: float(total) / n for name, total in totals.sums.items()}
    # A penalty that a run does not have is 0, so that all runs have the same columns.
    names = ("loss", "squared_error", *PENALTIES, "l0")
    line = {name: mean.get(name, 0.0) for name in names}
    variance = max(float(totals.sums["variance"]), 1e-30)
    error = float(totals.sums["squared_error"])
    line["explained_variance"] = 1 - error / variance
    lr, beta = _schedules(step - 1, numbers)
    return line | {
        "lr": float(lr),
        "beta": float(beta),
        "dead_fraction": float(dead),
    }


@jax.jit
def _schedules(step: Array, numbers: Numbers) -> tuple[Array, Array]:
    return optimizer.rate_of_step(step, numbers), optimizer.beta_of_step(step, numbers)


def _without_totals(state: TrainState) -> TrainState:
    zero = zero_totals(state.totals.sums)
    return state._replace(totals=mesh.filled(state.totals, zero))


def _shown(lines: Sequence[Mapping[str, float]]) -> dict[str, float | str]:
    """One arm's main numbers; for several arms the lowest and the highest."""
    if not lines:
        return {}
    rate: dict[str, float | str] = {"rows/s": lines[0]["rows_per_second"]}
    if len(lines) > 1:
        variance = [line["explained_variance"] for line in lines]
        dead = [line["dead_fraction"] for line in lines]
        ends = f"{min(variance):.4g} to {max(variance):.4g} over {len(lines)} arms"
        return {"EV": ends, "dead": f"up to {max(dead):.4g}"} | rate
    (line,) = lines
    return {
        "loss": line["loss"],
        "L0": line["l0"],
        "EV": line["explained_variance"],
        "dead": line["dead_fraction"],
    } | rate
