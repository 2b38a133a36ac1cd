"""`features/` in a run folder, which the command `features` writes: the names of its
files, and the statistics that other commands read from it."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from vsae_jax.runs.series import Arm
from vsae_jax.system.errors import UserError

FOLDER, ARRAYS, INFO = "features", "features.npz", "features.json"


class FiringStatistics(NamedTuple):
    """How often and how strongly each latent fires, each `[d_sae]`."""

    firing_rate: Float[np.ndarray, " d_sae"]
    mean_activation: Float[np.ndarray, " d_sae"]
    max_activation: Float[np.ndarray, " d_sae"]


def read_statistics(arm: Arm) -> FiringStatistics:
    """The statistics of a run's latents, from its `features.npz`."""
    path = arm.path(FOLDER, ARRAYS, made_by="features")
    with np.load(path, allow_pickle=False) as stored:
        missing = set(FiringStatistics._fields) - set(stored.files)
        if missing:
            raise UserError(f"{path} lacks {', '.join(sorted(missing))}")
        return FiringStatistics(*(stored[name] for name in FiringStatistics._fields))
