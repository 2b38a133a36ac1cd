"""What a sparsifier returns in training."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from jaxtyping import Array

from vsae_jax.autoencoder.arrays import Latents, Mask, PerRow

Arrays = Mapping[str, Array]
# Numbers that may be traced (k, noise_std, weights of penalties), by flag.
Numbers = Mapping[str, Any]


class Sparse(NamedTuple):
    """f, the selected latents, penalties `[batch]` by name, and the new buffers."""

    f: Latents
    selected: Mask
    penalties: dict[str, PerRow] = {}
    buffers: dict[str, Array] = {}
