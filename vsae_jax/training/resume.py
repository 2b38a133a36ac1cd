"""How runs begin: from their last checkpoints, or from their first states."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax

from vsae_jax import runs
from vsae_jax.autoencoder import sae
from vsae_jax.autoencoder.sparsifiers import sparsifier_of
from vsae_jax.config import SAEConfig
from vsae_jax.config.fields import difference, from_json
from vsae_jax.system import processes
from vsae_jax.system.errors import UserError
from vsae_jax.training.batches import Feed
from vsae_jax.training.checkpoint import Checkpoints
from vsae_jax.training.layout import make
from vsae_jax.training.plan import PlannedRun, first_b_dec, first_state
from vsae_jax.training.step import TrainState

_MEDIAN_ROWS = 8192
# The settings that decide which arrays there are, and their shapes.
_OF_SHAPES = ("d_model", "d_sae", "variance", "gate", "sparsity")


class Together(NamedTuple):
    """Arms that go on together, the state that each starts from, and those that have
    to wait because they are at another step, in lists of arms at one step."""

    arms: list[PlannedRun]
    states: list[TrainState]
    waiting: list[list[PlannedRun]]


def together(
    arms: Sequence[PlannedRun], saves: Mapping[Path, Checkpoints], feed: Feed
) -> Together:
    """The arms that can go on together.

    A kill while arms are being saved leaves some of them a checkpoint ahead: those go
    back to the last step that all of them have.
    """
    saved = {arm.folder: saves[arm.folder].steps() for arm in arms}
    ahead = [arm for arm in arms if saved[arm.folder]]
    fresh = [arm for arm in arms if not saved[arm.folder]]
    if not ahead:
        b_decs: dict[Any, jax.Array | None] = {}
        return Together(fresh, [_fresh(arm, feed, b_decs) for arm in fresh], [])
    newest = min(saved[arm.folder][-1] for arm in ahead)
    going, states, other = [], [], []
    for arm in ahead:
        state = _restored(arm, saves[arm.folder], newest if len(ahead) > 1 else None)
        if not states or int(state.step) == int(states[0].step):
            going.append(arm)
            states.append(state)
        else:
            other.append([arm])
    return Together(going, states, [*other, *([fresh] if fresh else [])])


def fork(job: PlannedRun, own: Checkpoints) -> None:
    """Makes the last checkpoint of the run that `--fork_from` names the first one of
    the new run, unless that has one already. Noise comes from the new seed, the scale
    from the new config and rows."""
    if not job.train.fork_from or own.steps():
        return
    source = Path(job.train.fork_from)
    if (source / runs.GRID).is_file():
        source = source / job.folder.name
    if source.resolve() == job.folder.resolve():
        raise UserError(f"--fork_from={source} is --out itself; give another --out")
    of_source = job._replace(sae=_forkable(source, job))
    like = jax.eval_shape(partial(first_state, of_source, None))
    with Checkpoints(source / runs.CHECKPOINTS, read_only=True) as checkpoints:
        found = checkpoints.restore(like)
    if found is None:
        raise UserError(f"--fork_from={source} has no checkpoint yet")
    trained, new = found[0], first_state(job, None)
    # The moments are the same; the stateless parts between them depend on the config.
    moments = jax.tree.leaves(trained.opt_state)
    # A running threshold goes on, in the units of the new scale.
    ratio = new.norm["scale"] / trained.norm["scale"]
    thresholds = {n: ratio * trained.norm[n] for n in sparsifier_of(job.sae).BUFFERS}
    state = new._replace(
        step=trained.step,
        norm=new.norm | thresholds,
        params=trained.params,
        opt_state=jax.tree.unflatten(jax.tree.structure(new.opt_state), moments),
        rows_since_fired=trained.rows_since_fired,
    )
    step, steps = int(state.step), job.train.steps
    if step >= steps:
        raise UserError(
            f"--steps={steps} must be above the {step} steps that --fork_from={source} "
            "has done, which count"
        )
    print(f"{job.folder.name} starts from step {step} of {source}")
    own.save(state, data_position=step * job.train.batch_size)


def _forkable(source: Path, job: PlannedRun) -> SAEConfig:
    """The source's config; refuses a run whose arrays have other shapes."""
    if not (source / runs.CHECKPOINTS).is_dir():
        raise UserError(f"--fork_from={source} is not a run with checkpoints")
    where = source / runs.CONFIG
    stored = from_json(SAEConfig, runs.read_json(where).get("sae"), where=str(where))
    if sae.shapes(stored) != sae.shapes(job.sae):
        old, new = ({n: getattr(c, n) for n in _OF_SHAPES} for c in (stored, job.sae))
        changed = difference(old, new)
        raise UserError(
            f"--fork_from={source} has arrays of other shapes ({changed}); give the "
            "same --d_sae, --variance, --gate and sparsity"
        )
    return stored


def _restored(
    job: PlannedRun, checkpoints: Checkpoints, up_to: int | None
) -> TrainState:
    """The newest state, if possible of step `up_to` or earlier."""
    like = jax.eval_shape(partial(first_state, job, None))
    found = checkpoints.restore(like, up_to=up_to) or checkpoints.restore(like)
    assert found is not None  # an unreadable folder is refused by `restore`
    if processes.first():
        runs.keep_metrics_up_to(job.folder / runs.METRICS, int(found[0].step))
    return found[0]


def _fresh(
    job: PlannedRun, feed: Feed, b_decs: dict[Any, jax.Array | None]
) -> TrainState:
    if processes.first():
        (job.folder / runs.METRICS).unlink(missing_ok=True)
    kind = job.train.b_dec_init, job.train.input_scale, job.train.center_input
    if kind not in b_decs:
        b_decs[kind] = first_b_dec(job, feed.first(_MEDIAN_ROWS))
    return make(partial(first_state, job), b_decs[kind], mesh=job.mesh)
