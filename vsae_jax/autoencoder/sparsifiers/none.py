"""Every latent stays: f = z (paper 2.1 with the relu, 2.2 without)."""

from collections.abc import Mapping

import jax.numpy as jnp
from jaxtyping import Array, Float

from vsae_jax.autoencoder.arrays import ArraySpec
from vsae_jax.autoencoder.sparsifiers.sparse import Numbers, Sparse
from vsae_jax.config import SAEConfig

ARRAYS: dict[str, ArraySpec] = {}
BUFFERS: dict[str, ArraySpec] = {}
THRESHOLD = None
WHOLE_BATCH = False


def apply(
    z: Float[Array, "batch d_sae"],
    arrays: Mapping[str, Array],
    numbers: Numbers,
    *,
    config: SAEConfig,
) -> Sparse:
    """f = z, all of it selected."""
    return Sparse(z, jnp.ones(z.shape, bool))


def encode(
    z: Float[Array, "batch d_sae"], arrays: Mapping[str, Array], *, config: SAEConfig
) -> Float[Array, "batch d_sae"]:
    """f = z."""
    return z
