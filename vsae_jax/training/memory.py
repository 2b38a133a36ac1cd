"""A forecast of the device memory that a training needs, and the flags that help."""

from collections.abc import Sequence

import jax
import numpy as np

from vsae_jax.activations.shards import READ
from vsae_jax.system.errors import UserError
from vsae_jax.system.memory import free_bytes
from vsae_jax.system.mesh import name
from vsae_jax.system.progress import size
from vsae_jax.training import groups
from vsae_jax.training.plan import PlannedRun, steps_at_once

# `batches` holds two groups of rows; up to four dispatches are made, wait or run.
_GROUPS_BYTES = 2 * 2**29
_DISPATCHES = 4


def of_one(planned: PlannedRun) -> int:
    """Roughly the bytes that one more arm takes on a device."""
    return groups.bytes_of_one(
        planned.sae, batch_size=planned.train.batch_size, mesh=planned.mesh
    )


def foresee(arms: Sequence[PlannedRun]) -> str:
    """A line that says what is needed; refuses what does not fit even one arm at a
    time."""
    planned = max(arms, key=of_one)
    needs, free = _needs(planned), free_bytes()
    total = sum(needs.values())
    parts = ", ".join(
        f"{what} {size(n)} ({flags})" for (what, flags), n in needs.items()
    )
    where = "" if planned.mesh is None else f" on each device ({name(planned.mesh)})"
    if total > free:
        raise UserError(
            f"{planned.folder} will not fit: it needs about {size(total)} of memory"
            f"{where} and {size(free)} are free; lower the flag of what is large: "
            f"{parts}"
        )
    return f"memory  about {size(total)} for an arm{where}, {size(free)} free: {parts}"


def _needs(planned: PlannedRun) -> dict[tuple[str, str], int]:
    """Bytes by what needs them and by the flags that lower them, the largest first."""
    parameters = groups.bytes_of_one(planned.sae, batch_size=0, mesh=planned.mesh)
    batch_size = planned.train.batch_size
    row = planned.sae.d_model * np.dtype(READ[planned.data["dtype"]]).itemsize
    all_rows = planned.data["train_rows"] * row
    rows = _DISPATCHES * steps_at_once([planned]) * batch_size * row
    rows //= 1 if planned.mesh is None else planned.mesh.shape["data"]
    flags = "--steps_per_dispatch, --batch_size"
    if planned.train.feed == "device":
        rows, flags = rows + all_rows, "--feed=stream"
    elif jax.default_backend() == "cpu":
        stream = planned.train.stream
        rows += 2 * row * planned.train.buffer_rows if stream else 0
        rows += 0 if stream else min(_GROUPS_BYTES, 2 * all_rows)
        flags += ", --buffer_rows" if stream else ""
    many = jax.device_count() > 1
    needs = {
        (
            "parameters, moments and gradients",
            "--d_sae, or more latents in --mesh" if many else "--d_sae",
        ): parameters,
        (
            "latents of a batch",
            "--batch_size, --d_sae" + (", or more data in --mesh" if many else ""),
        ): of_one(planned) - parameters,
        ("rows", flags): rows,
    }
    return dict(sorted(needs.items(), key=lambda item: -item[1]))
