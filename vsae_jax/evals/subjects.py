"""The runs that are evaluated together."""

import hashlib
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np

from vsae_jax import lm, runs
from vsae_jax.config import OpenOptions
from vsae_jax.interop.loading import open_any
from vsae_jax.runs.opening import Subject, subject_of

# What subjects that are evaluated together must have in common.
_SHARED = (
    "model",
    "revision",
    "hook_name",
    "bos",
    "dropped_positions",
    "center_residual",
    "tokens_from",
)


def open_subjects(
    config: OpenOptions, folders: Sequence[Path] | None = None
) -> list[list[Subject]]:
    """The runs that `--run` names, or some of their folders, grouped by language model,
    hook and tokens."""
    lm.leave_room(backend=config.backend, device=config.device)
    if folders is None:
        folders = runs.run_folders(config.run)
    opened = [open_any(folder) for folder in folders]
    load = cache(lm.load_language_model)
    groups: dict[tuple, list[Subject]] = {}
    for run in opened:
        subject = subject_of(run, config, load)
        tokens = np.ascontiguousarray(subject.tokens)
        shared = (
            *(subject.config[name] for name in _SHARED),
            tokens.shape,
            hashlib.sha256(tokens.data).digest(),
        )
        first = groups.setdefault(shared, [])
        if first:
            subject = subject._replace(tokens=first[0].tokens)
        first.append(subject)
    return list(groups.values())
