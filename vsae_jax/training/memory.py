"""What a training needs of the device's memory, foreseen, and which flag helps."""

from collections.abc import Sequence

import jax
import numpy as np

from vsae_jax.activations.shards import READ
from vsae_jax.system.errors import UserError
from vsae_jax.system.mesh import name
from vsae_jax.system.progress import size
from vsae_jax.training import groups
from vsae_jax.training.plan import Job, steps_at_once

# `batches` holds two groups of rows; four dispatches wait, run or are being made.
_GROUPS_BYTES = 2 * 2**29
_DISPATCHES = 4


def of_one(job: Job) -> int:
    """About the bytes that one more arm takes on a device."""
    return groups.bytes_of_one(job.sae, batch_size=job.train.batch_size, mesh=job.mesh)


def foresee(jobs: Sequence[Job]) -> str:
    """The line of the plan; refuses what will not fit even with one arm at a time."""
    job = max(jobs, key=of_one)
    needs, free = _needs(job), groups.free_bytes()
    total = sum(needs.values())
    parts = ", ".join(
        f"{what} {size(n)} ({flags})" for (what, flags), n in needs.items()
    )
    where = "" if job.mesh is None else f" on each device ({name(job.mesh)})"
    if total > free:
        raise UserError(
            f"{job.folder} will not fit: it needs about {size(total)} of memory{where} "
            f"and {size(free)} are free; lower the flag of what is large: {parts}"
        )
    return f"memory  about {size(total)} for an arm{where}, {size(free)} free: {parts}"


def _needs(job: Job) -> dict[tuple[str, str], int]:
    """Bytes by what needs them and the flags that help, the largest first."""
    parameters = groups.bytes_of_one(job.sae, batch_size=0, mesh=job.mesh)
    batch_size = job.train.batch_size
    row = job.sae.d_model * np.dtype(READ[job.data["dtype"]]).itemsize
    all_rows = job.data["train_rows"] * row
    rows = _DISPATCHES * steps_at_once([job]) * batch_size * row
    rows //= 1 if job.mesh is None else job.mesh.shape["data"]
    flags = "--steps_per_dispatch, --batch_size"
    if job.train.feed == "device":
        rows, flags = rows + all_rows, "--feed=stream"
    elif jax.default_backend() == "cpu":
        rows += min(_GROUPS_BYTES, 2 * all_rows)
    many = jax.device_count() > 1
    needs = {
        (
            "parameters, moments and gradients",
            "--d_sae, or more latents in --mesh" if many else "--d_sae",
        ): parameters,
        (
            "latents of a batch",
            "--batch_size, --d_sae" + (", or more data in --mesh" if many else ""),
        ): of_one(job) - parameters,
        ("rows", flags): rows,
    }
    return dict(sorted(needs.items(), key=lambda item: -item[1]))
