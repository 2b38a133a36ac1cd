"""f = z where z is among the batch's B k largest (Bussmann et al. 2024).

At evaluation a row stands alone: f = z where z > threshold, a running mean of each
batch's smallest kept value, the noise of a variational autoencoder included. Its
authors and SAELens add 1 % of each batch's to 99 % of what was, from 0 on, so that it
is too low for some hundred steps; dictionary_learning adds 0.1 % from step 1,000 on to
the first it saw. Here it starts with the first, too, but at once: after a thousand
steps at 1 % nothing is left of it.
"""

from collections.abc import Mapping

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from vsae_jax.autoencoder.arrays import ArraySpec
from vsae_jax.autoencoder.sparsifiers.sparse import Numbers, Sparse
from vsae_jax.autoencoder.sparsity import keep_batch_top_k
from vsae_jax.config import SAEConfig

ARRAYS: dict[str, ArraySpec] = {}
# 0 until a batch has kept a value above 0; never below.
BUFFERS = {"threshold": ArraySpec((), in_latents=True)}
THRESHOLD = "threshold"
WHOLE_BATCH = True


def apply(
    z: Float[Array, "batch d_sae"],
    arrays: Mapping[str, Array],
    numbers: Numbers,
    *,
    config: SAEConfig,
) -> Sparse:
    """batch * numbers["k"] latents; k may be traced, up to config.k. Where `arrays` has
    a threshold, it moves towards this batch's."""
    f, selected = keep_batch_top_k(z, numbers["k"], k_max=config.k, method=config.top_k)
    if "threshold" not in arrays:
        return Sparse(f, selected)
    moved = _moved(arrays["threshold"], f, numbers["threshold_decay"])
    return Sparse(f, selected, buffers={"threshold": moved})


def _moved(
    threshold: Float[Array, ""],
    f: Float[Array, "batch d_sae"],
    decay: Float[Array, ""],
) -> Float[Array, ""]:
    """decay * threshold + (1 - decay) * the smallest f above 0, which is also the
    first; a batch without one leaves it."""
    smallest = lax.stop_gradient(jnp.min(jnp.where(f > 0, f, jnp.inf)))
    mean = decay * threshold + (1 - decay) * smallest
    moved = jnp.where(threshold > 0, mean, smallest)
    return jnp.where(jnp.isfinite(smallest), moved, threshold)


def encode(
    z: Float[Array, "batch d_sae"], arrays: Mapping[str, Array], *, config: SAEConfig
) -> Float[Array, "batch d_sae"]:
    """f = z where z > threshold; as many as that are in a row."""
    return jnp.where(z > arrays["threshold"], z, 0)
