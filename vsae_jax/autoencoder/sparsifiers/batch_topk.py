"""f = z where z is among the batch's B k largest (Bussmann et al. 2024).

At evaluation each row stands alone: f = z where z > threshold. The threshold is a
running mean of each batch's smallest kept value (with the noise of a variational
autoencoder). Its authors and SAELens start it at 0 and move it by 1 % per batch, so it
is too low for some hundred steps. dictionary_learning starts it at the value of step
1,000 and moves it by 0.1 %. Here it starts at the first batch's value, of which nothing
is left after a thousand steps of 1 %.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from vsae_jax.autoencoder.arrays import ArraySpec, Latents
from vsae_jax.autoencoder.sparsifiers.sparse import Arrays, Numbers, Sparse
from vsae_jax.autoencoder.sparsity import keep_batch_top_k
from vsae_jax.config import SAEConfig

ARRAYS: dict[str, ArraySpec] = {}
# 0 until a batch has kept a value above 0; never negative.
BUFFERS = {"threshold": ArraySpec((), in_latents=True)}
THRESHOLD = "threshold"
WHOLE_BATCH = True


def apply(z: Latents, arrays: Arrays, numbers: Numbers, *, config: SAEConfig) -> Sparse:
    """batch * numbers["k"] latents; k may be traced, up to config.k. If `arrays` has a
    threshold, it moves towards this batch's."""
    f, selected = keep_batch_top_k(z, numbers["k"], k_max=config.k, method=config.top_k)
    if "threshold" not in arrays:
        return Sparse(f, selected)
    moved = _moved(arrays["threshold"], f, numbers["threshold_decay"])
    return Sparse(f, selected, buffers={"threshold": moved})


def _moved(
    threshold: Float[Array, ""],
    f: Latents,
    decay: Float[Array, ""],
) -> Float[Array, ""]:
    """decay * threshold + (1 - decay) * the smallest f above 0, which is also the first
    threshold. A batch without such an f changes nothing."""
    smallest = lax.stop_gradient(jnp.min(jnp.where(f > 0, f, jnp.inf)))
    mean = decay * threshold + (1 - decay) * smallest
    moved = jnp.where(threshold > 0, mean, smallest)
    return jnp.where(jnp.isfinite(smallest), moved, threshold)


def encode(z: Latents, arrays: Arrays, *, config: SAEConfig) -> Latents:
    """f = z where z > threshold, however many that are in a row."""
    return jnp.where(z > arrays["threshold"], z, 0)
