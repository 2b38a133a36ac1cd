"""`python -m vsae_jax.train`: activations on disk to a trained autoencoder.

One loop: batches are read ahead in a thread, several steps run in one dispatch, the
device is read once per log interval, and a run that is started again goes on.
"""

import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vsae_jax import cli, loggers, optim, progress, runs, signals, sweep
from vsae_jax.batches import ShuffledRows, read_ahead
from vsae_jax.checkpoint import Checkpoints
from vsae_jax.config import TrainConfig
from vsae_jax.errors import Interrupted, UserError
from vsae_jax.job import Job, explain, first_state, open_folder, plan
from vsae_jax.shards import READ
from vsae_jax.sparsity import dead_latents
from vsae_jax.step import (
    Hparams,
    TrainState,
    compile_steps,
    hparams,
    variables,
    zero_totals,
)

_MEDIAN_ROWS = 8192


class Chunk(NamedTuple):
    """Steps `start` to `stop` in one dispatch, and what follows them."""

    start: int
    stop: int
    log: bool
    save: bool


def command(configs: Sequence[TrainConfig]) -> None:
    """One run, or a grid where flags held comma lists."""
    if len(configs) == 1:
        run(configs[0])
    else:
        sweep.run(configs, train_one=run)


def run(config: TrainConfig) -> Path:
    """Trains to the end, resuming where a run folder is already there.

    Returns the run folder. Raises UserError for what a user can mend and Interrupted
    when a signal stopped it after saving.
    """
    job = plan(config)
    explain(job, asked=config)
    if not open_folder(job):
        print(f"{job.folder} is finished; nothing to do")
        return job.folder
    with Checkpoints(job.folder / runs.CHECKPOINTS) as checkpoints:
        state, position = _start(job, checkpoints)
        if state.step:
            print(f"going on from step {int(state.step)}")
        state = _loop(job, state, position, checkpoints)
    runs.write_parameters(
        job.folder / runs.PARAMETERS, jax.device_get(variables(state, job.sae))
    )
    print(f"wrote {job.folder / runs.PARAMETERS}")
    return job.folder


def _start(job: Job, checkpoints: Checkpoints) -> tuple[TrainState, int]:
    """The last checkpoint's state and data position, or the first ones."""
    like = jax.eval_shape(partial(first_state, job, None))
    if restored := checkpoints.restore(like):
        state, position = restored
        runs.keep_metrics_up_to(job.folder / runs.METRICS, int(state.step))
        return state, position
    (job.folder / runs.METRICS).unlink(missing_ok=True)
    sample = None
    if job.train.b_dec_init == "geometric_median":
        count = min(_MEDIAN_ROWS, job.data["train_rows"])
        sample = jnp.asarray(_rows(job).take(0, count), jnp.float32)
    return first_state(job, sample), 0


def _rows(job: Job) -> ShuffledRows:
    return ShuffledRows(
        job.activations.rows,
        n_rows=job.data["train_rows"],
        row_bytes=job.sae.d_model * np.dtype(READ[job.data["dtype"]]).itemsize,
        seed=job.train.data_seed,
    )


def _loop(
    job: Job, state: TrainState, position: int, checkpoints: Checkpoints
) -> TrainState:
    steps = compile_steps(job.sae)
    numbers = hparams(job.train)
    chunks = list(_chunks(int(state.step), job.train))
    batches = read_ahead(_stacks(job, chunks, position))
    logs = loggers.open_loggers(job.train, job.folder)
    clock = _Clock(job.train.batch_size)
    bar = progress.bar(job.train.steps, unit="step", start=int(state.step))
    try:
        with bar, signals.caught() as caught:
            for chunk, rows in zip(chunks, batches, strict=True):
                state = steps(state, rows, chunk.stop - chunk.start, numbers)
                if chunk.log:
                    state, metrics = _read(state, numbers, checkpoints, clock)
                    for log in logs:
                        log.write(chunk.stop, metrics)
                    bar.show(_shown(metrics))
                bar.update(chunk.stop - chunk.start)
                if chunk.save or caught.signal:
                    _check_finite(state.totals, checkpoints)
                    done = chunk.stop * job.train.batch_size
                    checkpoints.save(state, data_position=done)
                if caught.signal:
                    raise Interrupted(
                        f"stopped by a signal; step {chunk.stop} is saved in "
                        f"{job.folder}: run the same command to go on",
                        signal_number=caught.signal,
                    )
    finally:
        batches.close()
        for log in logs:
            log.close()
    return state


def _chunks(start: int, config: TrainConfig) -> Iterator[Chunk]:
    """Dispatches from `start` to the end, cut at every log line and checkpoint."""
    while start < config.steps:
        stop = min(
            start + config.steps_per_dispatch,
            _next(start, config.log_every),
            _next(start, config.checkpoint_every),
            config.steps,
        )
        last = stop == config.steps
        log = last or stop % config.log_every == 0
        yield Chunk(start, stop, log, last or stop % config.checkpoint_every == 0)
        start = stop


def _next(step: int, every: int) -> int:
    return (step // every + 1) * every


def _stacks(job: Job, chunks: Sequence[Chunk], position: int) -> Iterator[jax.Array]:
    """For each chunk `[n_max, batch, d_model]` on the device; unused batches are 0."""
    rows = _rows(job)
    batch = job.train.batch_size
    n_max = max((chunk.stop - chunk.start for chunk in chunks), default=0)
    for chunk in chunks:
        count = (chunk.stop - chunk.start) * batch
        taken = rows.take(position, count)
        position += count
        unused = n_max * batch - count
        if unused:
            taken = np.pad(taken, ((0, unused), (0, 0)))
        yield jnp.asarray(taken.reshape(n_max, batch, -1))


class _Clock:
    """Rows per second between log lines; the first interval holds the compilation."""

    def __init__(self, batch_size: int):
        self._batch_size = batch_size
        self._last = time.monotonic()

    def rate(self, steps: int) -> float:
        now = time.monotonic()
        seconds, self._last = max(now - self._last, 1e-9), now
        return steps * self._batch_size / seconds


def _read(
    state: TrainState, numbers: Hparams, checkpoints: Checkpoints, clock: _Clock
) -> tuple[TrainState, dict[str, float]]:
    """The interval's metrics, by the loop's one device read, and the sums at zero."""
    dead = jnp.mean(dead_latents(state.rows_since_fired, numbers.dead_after_tokens))
    last = state.step - 1
    schedule = {
        "lr": optim.learning_rate(
            last,
            peak=numbers.lr,
            warmup=numbers.lr_warmup_steps,
            decay_start=numbers.lr_decay_start,
            steps=numbers.steps,
        ),
        "beta": optim.kl_weight(
            last, beta=numbers.beta, warmup=numbers.kl_warmup_steps
        ),
        "dead_fraction": dead,
    }
    totals, schedule = jax.device_get((state.totals, schedule))
    _check_finite(totals, checkpoints)
    n = int(totals.steps)
    names = ("loss", "squared_error", "kl", "l1", "auxk", "l0")
    metrics = {name: float(getattr(totals, name)) / n for name in names}
    variance = max(float(totals.variance), 1e-30)
    metrics["explained_variance"] = 1 - float(totals.squared_error) / variance
    metrics |= {name: float(value) for name, value in schedule.items()}
    metrics["rows_per_second"] = clock.rate(n)
    return state._replace(totals=zero_totals()), metrics


def _check_finite(totals: Any, checkpoints: Checkpoints) -> None:
    bad = int(totals.bad_step)
    if bad < 0:
        return
    saved = checkpoints.steps()
    good = f"step {saved[-1]} is saved" if saved else "nothing was saved before it"
    raise UserError(
        f"the loss is not finite at step {bad}; {good}; try a lower --lr, a smaller "
        "--beta or --dtype=float32 with another --out"
    )


def _shown(metrics: dict[str, float]) -> dict[str, float]:
    return {
        "loss": metrics["loss"],
        "L0": metrics["l0"],
        "EV": metrics["explained_variance"],
        "dead": metrics["dead_fraction"],
        "rows/s": metrics["rows_per_second"],
    }


if __name__ == "__main__":
    cli.main(command, TrainConfig)
