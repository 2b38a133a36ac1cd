"""The training loop, the same for a single run and for a grid.

Batches are read ahead in a thread, every arm takes the same ones, several steps run in
one dispatch, and the device is read once per log interval. A run that was stopped goes
on from its last checkpoint.
"""

import contextlib
import time
from collections.abc import Generator, Mapping, Sequence
from functools import partial
from pathlib import Path

import jax
from jax.sharding import Mesh

from vsae_jax import runs
from vsae_jax.activations.shuffle import read_ahead
from vsae_jax.system import locks, processes, progress, signals
from vsae_jax.system.errors import Interrupted, UserError
from vsae_jax.system.memory import free_bytes
from vsae_jax.system.mesh import name
from vsae_jax.training import memory, resume
from vsae_jax.training.batches import Feed
from vsae_jax.training.checkpoint import Checkpoints
from vsae_jax.training.groups import (
    Arm,
    Group,
    Plan,
    advance,
    compile_pass,
    split,
    states,
)
from vsae_jax.training.layout import make
from vsae_jax.training.pace import Chunk, Pace, chunks
from vsae_jax.training.plan import PlannedRun, explain, open_folder, steps_at_once
from vsae_jax.training.recorder import Watch
from vsae_jax.training.step import TrainState, hparams, variables


def run_arms(arms: Sequence[PlannedRun]) -> None:
    """Trains every arm that is not finished, together where they can share batches."""
    with contextlib.ExitStack() as locked:
        _run_arms(arms, locked)


def _run_arms(arms: Sequence[PlannedRun], locked: contextlib.ExitStack) -> None:
    streams: dict[tuple, list[PlannedRun]] = {}
    diverged: list[str] = []
    for number, planned in enumerate(arms, start=1):
        if len(arms) > 1:
            print(f"arm {number} of {len(arms)}: {planned.folder.name}")
        explain(planned)
        locked.enter_context(locks.held(planned.folder, doing="train"))
        unfinished = processes.in_turn(open_folder, planned)
        if (planned.folder / runs.DIVERGED).is_file():
            diverged.append(planned.folder.name)
        elif not unfinished:
            print(f"{planned.folder} is finished; nothing to do")
        else:
            streams.setdefault(planned.batches, []).append(planned)
    for members in streams.values():
        diverged += _train(members)
    if diverged:
        raise UserError(
            f"{len(diverged)} of {len(arms)} arms diverged ({', '.join(diverged)}); "
            "the others are finished; train those with a lower --lr or a smaller "
            "--beta in a grid of their own"
        )


def _train(arms: Sequence[PlannedRun]) -> list[str]:
    """Trains arms that share a stream of batches, in as few passes over it as memory
    and their checkpoints allow; returns the names of those that diverged."""
    diverged: list[str] = []
    with contextlib.ExitStack() as stack:
        print(memory.foresee(arms))
        if arms[0].train.verify:
            activations = arms[0].activations
            activations.verify(range(len(activations.manifest.shards)))
        feed = stack.enter_context(Feed(arms[0]))
        saves = {
            planned.folder: stack.enter_context(
                Checkpoints(planned.folder / runs.CHECKPOINTS, mesh=planned.mesh)
            )
            for planned in arms
        }
        for planned in arms:
            resume.fork(planned, saves[planned.folder])
        one = max(map(memory.of_one, arms))
        waiting = split(arms, one)
        if len(waiting) > 1:
            print(f"memory for {len(waiting[0])} arms at once: {len(waiting)} passes")
        while waiting:
            together = resume.together(waiting.pop(0), saves, feed)
            waiting[:0] = together.waiting
            diverged += _one_pass(together.arms, together.states, saves, feed)
    return diverged


def _one_pass(
    arms: Sequence[PlannedRun],
    starts: list[TrainState],
    saves: Mapping[Path, Checkpoints],
    feed: Feed,
) -> list[str]:
    """Trains arms that are at the same step to the end and writes their parameters;
    returns the names of those that diverged. Empties `starts`, their states."""
    config, step = arms[0].train, int(starts[0].step)
    if step:
        print(f"going on from step {step}")
    pace = Pace(max(min(steps_at_once(arms), config.steps - step), 1))
    mesh = arms[0].mesh
    members = [
        Arm(
            arm.sae,
            make(partial(hparams, arm.train), mesh=mesh),
            state,
            arm.kernels.kernels,
        )
        for arm, state in zip(arms, starts, strict=True)
    ]
    compiled = compile_pass(members, feed.shape(pace.most), how=config.arms, mesh=mesh)
    # With vmap the compiled states are copies; these would keep their memory.
    del members
    starts.clear()
    print(_describe(compiled, len(arms), mesh))
    calls = (
        (c, feed.stack(c.start * config.batch_size, c.stop - c.start, n_max=pace.most))
        for c in chunks(step, config, pace)
    )
    watch = Watch(arms, saves, step=step)
    groups = _loop(compiled.groups, read_ahead(calls), watch, pace, step)
    for place, state in states(groups).items():
        planned = arms[place]
        if planned.folder.name not in watch.diverged:
            trained = processes.gathered(variables(state, planned.sae))
            if processes.first():
                runs.write_parameters(planned.folder / runs.PARAMETERS, trained)
            print(f"wrote {planned.folder / runs.PARAMETERS}")
    return watch.diverged


def _loop(
    groups: Sequence[Group],
    calls: Generator[tuple[Chunk, jax.Array], None, None],
    watch: Watch,
    pace: Pace,
    step: int,
) -> Sequence[Group]:
    bar = progress.bar(watch.jobs[0].train.steps, unit="steps", start=step)
    stop, waiting, measured, since = 0, 0, step, time.monotonic()
    try:
        with bar, signals.caught() as caught:
            for chunk, rows in calls:
                groups = advance(groups, rows, chunk.stop - chunk.start)
                if chunk.log:
                    groups = watch.log(groups, chunk.stop)
                    bar.show(watch.shown)
                bar.update(chunk.stop - chunk.start)
                waiting += 1
                if waiting >= pace.ahead:
                    jax.block_until_ready([group.state for group in groups])
                    seconds, since = time.monotonic() - since, time.monotonic()
                    pace.took(seconds, steps=chunk.stop - measured)
                    waiting, measured = 0, chunk.stop
                if len(watch.diverged) == len(watch.jobs):
                    break
                if chunk.log or processes.count() == 1:
                    stop = processes.agreed(caught.signal)
                if chunk.save or stop:
                    watch.save(groups, chunk.stop)
                if stop:
                    raise Interrupted(
                        f"stopped by a signal; step {chunk.stop} is saved in "
                        f"{watch.folder}: run the same command to go on",
                        signal_number=stop,
                    )
    finally:
        calls.close()
        watch.close()
    return groups


def _describe(compiled: Plan, arms: int, mesh: Mesh | None) -> str:
    free = free_bytes()
    where = "" if mesh is None else f" of each device ({name(mesh)})"
    many = f"{arms} arms, " if arms > 1 else ""
    programs = (
        "1 program" if compiled.functions == 1 else f"{compiled.functions} programs"
    )
    return (
        f"{many}{programs} compiled in {compiled.seconds:.1f} s; memory{where}: states "
        f"{compiled.state_bytes / 1e9:.2f} GB, a step {compiled.work_bytes / 1e9:.2f} "
        f"GB, {free / 1e9:.1f} GB free"
    )
