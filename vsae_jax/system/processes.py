"""Several processes of one run, on one machine or many, through jax.distributed.

All run the same program on the same folders. The first writes what is to be written
once; what only some of them know (such as a signal) is told to all.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from vsae_jax.system import progress
from vsae_jax.system.errors import UserError, one_line

# How long a process that fails waits for the others at its end, in seconds.
_GOODBYE_S = 10


@contextlib.contextmanager
def joined(config: Any) -> Iterator[None]:
    """Within the block this process is one of a run's, as the flags say; all but the
    first are silent. To be entered before anything asks JAX for its devices."""
    c = config
    if not c.coordinator:
        yield
        return
    address = None if c.coordinator == "auto" else c.coordinator
    # That service would take SIGTERM, which `signals` handles.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            address,
            c.num_processes,
            c.process_id,
            shutdown_timeout_seconds=_GOODBYE_S,
        )
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"--coordinator={c.coordinator}: the processes did not find one another "
            f"({one_line(error)})"
        ) from None
    with contextlib.ExitStack() as stack:
        if not first():
            stack.enter_context(progress.silent())
        with _naming_the_lost():
            yield


@contextlib.contextmanager
def _naming_the_lost() -> Iterator[None]:
    """Within the block, XLA's long error about a lost process becomes one line."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" in str(error):
            raise
        raise UserError(
            "another process of this run has ended or cannot be reached: start all of "
            f"them again with the same flags, and they go on ({one_line(error)})"
        ) from error


def count() -> int:
    """Processes of this run."""
    return jax.process_count()


def first() -> bool:
    """Whether this is the process that writes what is written once."""
    return jax.process_index() == 0


def wait(where: str) -> None:
    """Returns once every process has come to `where`."""
    if count() > 1:
        multihost_utils.sync_global_devices(where)


def in_turn(work: Callable[..., Any], *arguments: Any) -> Any:
    """`work(*arguments)` in the first process and then in the others, which find what
    it wrote; where it fails it fails in all."""
    if not first():
        wait(work.__name__)
        return work(*arguments)
    try:
        return work(*arguments)
    finally:
        wait(work.__name__)


def agreed(number: int) -> int:
    """The largest of the processes' numbers; all of them must call this together."""
    if count() == 1:
        return number
    return int(np.max(multihost_utils.process_allgather(np.int32(number))))


def gathered(tree: Any) -> Any:
    """A tree of NumPy arrays from one whose arrays may lie in other processes."""
    if count() == 1:
        return jax.device_get(tree)
    return multihost_utils.process_allgather(tree, tiled=True)
