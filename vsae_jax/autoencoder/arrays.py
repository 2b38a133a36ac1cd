"""What is known of an array of an autoencoder: its axes, its start, its units.

Each part (encoder, posterior, gate, sparsifier, decoder) lists its arrays once, as a
table of `ArraySpec` by name. Files, meshes, memory, forks, folding and other formats
read those tables through `sae.arrays` and `sae.buffers`.
"""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from vsae_jax.config import SAEConfig

Rows = Float[Array, "batch d_model"]
Latents = Float[Array, "batch d_sae"]
Mask = Bool[Array, "batch d_sae"]
PerRow = Float[Array, " batch"]


class Start(Protocol):
    """A function that makes an array's first value from the key, its shape and the
    arrays made before it."""

    def __call__(
        self, key: Any, /, shape: tuple[int, ...], made: Mapping[str, Array]
    ) -> Array: ...


def zeros(key: Any, /, shape: tuple[int, ...], made: Mapping[str, Array]) -> Array:
    """Zeros of `shape`."""
    return jnp.zeros(shape)


def ones(key: Any, /, shape: tuple[int, ...], made: Mapping[str, Array]) -> Array:
    """Ones of `shape`."""
    return jnp.ones(shape)


def unit_rows(key: Any, /, shape: tuple[int, ...], made: Mapping[str, Array]) -> Array:
    """Rows drawn uniformly from the sphere of radius 1."""
    w = jax.random.normal(key, shape, jnp.float32)
    return w / jnp.linalg.norm(w, axis=1, keepdims=True)


def transpose_of(name: str) -> Start:
    """A start that is the transpose of `name`, an array made before."""

    def start(key: Any, /, shape: tuple[int, ...], made: Mapping[str, Array]) -> Array:
        return made[name].T

    return start


class ArraySpec(NamedTuple):
    """The axes of an array, its start, and what follows from its meaning.

    times: the flag of `train` by which the start is multiplied.
    in_latents: whether it has the units of the latents and is scaled with them.
    log: whether training holds its logarithm (training/layout.py), to keep it above 0.
    """

    axes: tuple[Literal["d_model", "d_sae"], ...]
    start: Start = zeros
    times: str | None = None
    in_latents: bool = False
    log: bool = False

    def shape(self, config: SAEConfig) -> tuple[int, ...]:
        """The lengths of the axes."""
        return tuple(getattr(config, axis) for axis in self.axes)
