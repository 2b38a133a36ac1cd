"""What an array of an autoencoder is: its axes, how it starts, how it scales.

Each part (encoder, posterior, sparsifier, decoder) lists its arrays once, as a table
of `ArraySpec` by name. Files, meshes, memory, forks, folding and other formats read
those tables, through `sae.arrays` and `sae.buffers`.
"""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array

from vsae_jax.config import SAEConfig


class Start(Protocol):
    """The first value of an array, of the key, its shape and those made before it."""

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
    """Rows uniform on the sphere of radius 1, drawn from `key`."""
    w = jax.random.normal(key, shape, jnp.float32)
    return w / jnp.linalg.norm(w, axis=1, keepdims=True)


def transpose_of(name: str) -> Start:
    """The start that is the transpose of `name`, an array made before."""

    def start(key: Any, /, shape: tuple[int, ...], made: Mapping[str, Array]) -> Array:
        return made[name].T

    return start


class ArraySpec(NamedTuple):
    """The axes of an array, how it starts, and what follows from its meaning.

    times: the flag of `train` by which the start is multiplied.
    in_latents: it has the units of the latents, so it grows with them.
    log: training holds its logarithm (training/layout.py), so that it stays above 0.
    """

    axes: tuple[Literal["d_model", "d_sae"], ...]
    start: Start = zeros
    times: str | None = None
    in_latents: bool = False
    log: bool = False

    def shape(self, config: SAEConfig) -> tuple[int, ...]:
        """The lengths of the axes."""
        return tuple(getattr(config, axis) for axis in self.axes)
