"""The runs that are evaluated together."""

import hashlib
from functools import cache

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


def open_subjects(config: OpenOptions) -> list[list[Subject]]:
    """The runs that `--run` names, grouped by language model, hook and tokens."""
    lm.leave_room(backend=config.backend, device=config.device)
    opened = [open_any(folder) for folder in runs.run_folders(config.run)]
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
