"""What a sparsifier returns in training."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from jaxtyping import Array, Bool, Float

Latents = Float[Array, "batch d_sae"]
Arrays = Mapping[str, Array]
# Numbers that may be traced (k, noise_std, weights of penalties), by flag.
Numbers = Mapping[str, Any]


class Sparse(NamedTuple):
    """f, the selected latents, penalties `[batch]` by name, and the new buffers."""

    f: Latents
    selected: Bool[Array, "batch d_sae"]
    penalties: dict[str, Float[Array, " batch"]] = {}
    buffers: dict[str, Array] = {}
