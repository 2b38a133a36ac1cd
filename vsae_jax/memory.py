"""What a training needs of the device's memory, foreseen, and which flag helps."""

from collections.abc import Sequence

import jax
import numpy as np

from vsae_jax import sweep
from vsae_jax.errors import UserError
from vsae_jax.job import Job, steps_at_once
from vsae_jax.progress import size
from vsae_jax.shards import READ

# `batches` holds two groups of rows; four dispatches wait, run or are being made.
_GROUPS_BYTES = 2 * 2**29
_DISPATCHES = 4


def foresee(jobs: Sequence[Job]) -> str:
    """The line of the plan; refuses what will not fit even with one arm at a time."""
    job = max(jobs, key=lambda j: sweep.bytes_of_one(j.sae, batch_size=_batch(j)))
    needs, free = _needs(job), sweep.free_bytes()
    total = sum(needs.values())
    parts = ", ".join(
        f"{what} {size(n)} ({flags})" for (what, flags), n in needs.items()
    )
    if total > free:
        raise UserError(
            f"{job.folder} will not fit: it needs about {size(total)} of memory and "
            f"{size(free)} are free; lower the flag of what is large: {parts}"
        )
    return f"memory  about {size(total)} for an arm, {size(free)} free: {parts}"


def _needs(job: Job) -> dict[tuple[str, str], int]:
    """Bytes by what needs them and the flags that lower it, the largest first."""
    parameters = sweep.bytes_of_one(job.sae, batch_size=0)
    latents = sweep.bytes_of_one(job.sae, batch_size=_batch(job)) - parameters
    row = job.sae.d_model * np.dtype(READ[job.data["dtype"]]).itemsize
    all_rows = job.data["train_rows"] * row
    rows = _DISPATCHES * steps_at_once([job]) * _batch(job) * row
    flags = "--steps_per_dispatch, --batch_size"
    if job.train.feed == "device":
        rows, flags = rows + all_rows, "--feed=stream"
    elif jax.default_backend() == "cpu":
        rows += min(_GROUPS_BYTES, 2 * all_rows)
    needs = {
        ("parameters, moments and gradients", "--d_sae"): parameters,
        ("latents of a batch", "--batch_size, --d_sae"): latents,
        ("rows", flags): rows,
    }
    return dict(sorted(needs.items(), key=lambda item: -item[1]))


def _batch(job: Job) -> int:
    return job.train.batch_size
