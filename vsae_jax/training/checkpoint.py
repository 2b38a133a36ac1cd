"""Orbax checkpoints of a training state and its place in the data."""

import errno
import functools
import hashlib
import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Any, Self

import jax
import numpy as np
from jax.sharding import Mesh

from vsae_jax.system import processes
from vsae_jax.system.errors import UserError, one_line
from vsae_jax.training import old_checkpoints
from vsae_jax.training.layout import shaped
from vsae_jax.training.step import TrainState

_KEPT = 2


@functools.cache
def _quiet_closed_loops() -> None:
    """Silences what follows a failed array: Orbax closes the event loop, which
    TensorStore still uses for the other arrays, and Python would print a traceback of
    each."""
    hook = sys.unraisablehook

    def filtered(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            hook(unraisable)

    sys.unraisablehook = filtered
    never_awaited = r"coroutine 'async_\w*serialize.*' was never awaited"
    warnings.filterwarnings("ignore", message=never_awaited, category=RuntimeWarning)


class Checkpoints:
    """The last two checkpoints of a run, below `folder`; with `read_only`, nothing is
    changed there. A context manager.

    Each device writes its part of a state. What is restored lies on `mesh`, whatever
    the number of devices that wrote it.
    """

    def __init__(
        self, folder: Path, *, mesh: Mesh | None = None, read_only: bool = False
    ):
        # Orbax takes most of a second to import; commands that never train skip it.
        import orbax.checkpoint as ocp

        # Errors are raised and reported in one line. Orbax would also log tracebacks,
        # and asyncio those of the other arrays, which nobody waits for any more.
        for name in ("absl", "asyncio"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
        _quiet_closed_loops()
        self._args, self._mesh = ocp.args, mesh
        self._folder = folder.absolute()
        self._metadata: Any = ocp.StandardCheckpointHandler().metadata
        policy = ocp.checkpoint_managers.LatestN(_KEPT)
        self._damaged: set[int] = set()
        self._manager = ocp.CheckpointManager(
            self._folder,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=None if read_only else policy,
                enable_async_checkpointing=False,
                read_only=read_only,
                create=not read_only,
                # Removes what a kill left half written.
                cleanup_tmp_directories=not read_only,
            ),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._manager.close()

    def steps(self) -> list[int]:
        """Steps that have a checkpoint, ascending."""
        return sorted(self._manager.all_steps())

    def save(self, state: TrainState, *, data_position: int) -> None:
        """Writes `state` and the number of rows consumed, under the state's step."""
        step = int(state.step)
        if step in self.steps() and step not in self._damaged:
            return
        plain = _plain(state)
        progress = {"data_position": data_position, "sha256": _sha256(plain)}
        parts = self._args.Composite(
            state=self._args.StandardSave(plain),
            progress=self._args.JsonSave(progress),
        )
        try:
            # Orbax writes nothing below a step that is there: such a one is damaged, or
            # was ahead of the other arms of its grid, which went on from before it.
            for later in [there for there in self.steps() if there >= step]:
                self._manager.delete(later)
                self._damaged.discard(later)
            self._manager.save(step, args=parts)
        except (OSError, ValueError, RuntimeError) as error:
            raise UserError(
                f"the checkpoint of step {step} could not be written "
                f"({_reason(error)}); earlier checkpoints are intact: make room or fix "
                "the folder, then run the same command again"
            ) from error

    def restore(
        self, like: TrainState, *, up_to: int | None = None
    ) -> tuple[TrainState, int] | None:
        """The newest readable state, shaped `like`, and its data position; or None.

        A damaged checkpoint is named, and the one before it is used. Those of steps
        after `up_to` are left out.
        """
        for step in reversed(self.steps()):
            if up_to is not None and step > up_to:
                continue
            try:
                return self._read(step, like)
            # A damaged file can fail in Orbax, TensorStore or zstd with any type.
            except Exception as error:
                self._damaged.add(step)
                print(f"checkpoint of step {step} is damaged: {one_line(error)}")
        if self.steps() and up_to is None:
            raise UserError(
                "no checkpoint of this run can be read; delete its checkpoints folder "
                "to start it again"
            )
        return None

    def _read(self, step: int, like: TrainState) -> tuple[TrainState, int]:
        # Checked here, since Orbax finds out too late: each coroutine that it leaves
        # behind would print a traceback.
        stored = self._metadata(self._folder / str(step) / "state").tree
        old = old_checkpoints.is_old(stored)
        shape = jax.eval_shape(
            lambda state: _plain(old_checkpoints.as_old(state) if old else state), like
        )
        if _shapes(stored) != _shapes(shape):
            raise ValueError("its arrays are not those of this run")
        parts = self._args.Composite(
            state=self._args.StandardRestore(shaped(shape, self._mesh)),
            progress=self._args.JsonRestore(),
        )
        read = self._manager.restore(step, args=parts)
        if jax.tree.structure(read["state"]) != jax.tree.structure(shape):
            raise ValueError("its arrays are not those of this run")
        # Orbax has no checksum of the arrays' bytes; older checkpoints of ours neither.
        said = read["progress"].get("sha256")
        found = _sha256(read["state"])
        if None not in (said, found) and said != found:
            raise ValueError("its checksum is wrong")
        state = read["state"]
        state = state._replace(key=jax.random.wrap_key_data(state.key))
        state = old_checkpoints.as_new(state, like) if old else state
        if int(state.step) != step:
            raise ValueError(f"it holds step {int(state.step)}")
        return state, int(read["progress"]["data_position"])


def _sha256(plain: Any) -> str | None:
    """SHA-256 over all arrays in the tree's order; None where the state is spread over
    several processes, none of which has all of it."""
    if processes.count() > 1:
        return None
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(jax.device_get(plain)):
        digest.update(np.ascontiguousarray(leaf).data.cast("B"))
    return digest.hexdigest()


def _shapes(tree: Any) -> list[tuple[int, ...]]:
    return sorted(tuple(leaf.shape) for leaf in jax.tree.leaves(tree))


def _reason(error: Exception) -> str:
    """The operating system's message within TensorStore's, if there is one."""
    text = one_line(error)
    for number in (errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EDQUOT):
        if os.strerror(number) in str(error):
            return os.strerror(number)
    return text


def _plain(state: TrainState) -> Any:
    """The state with its key as numbers, which Orbax can store."""
    return state._replace(key=jax.random.key_data(state.key))
