"""f = z where z > theta, one threshold a latent (Rajamanoharan et al. 2024b).

The step at theta has no gradient. Theta gets the gradient of a step that rises over
the width `bandwidth` (a straight-through estimator with a rectangle), z only that of f
itself. The penalty, weighed by --l0, is the number of latents that are on, or with
--target_l0 the square of L0 / target - 1, where L0 is the batch's mean.

Files hold theta, as those of other libraries do. Training holds its logarithm, as the
paper does, so that theta stays above 0.
"""

import jax.numpy as jnp
from jax import lax

from vsae_jax.autoencoder.arrays import ArraySpec, Latents, ones
from vsae_jax.autoencoder.sparsifiers.sparse import Arrays, Numbers, Sparse
from vsae_jax.config import SAEConfig

ARRAYS = {
    "theta": ArraySpec(
        ("d_sae",), start=ones, times="threshold_init", in_latents=True, log=True
    )
}
BUFFERS: dict[str, ArraySpec] = {}
THRESHOLD = "theta"
# The penalty may need the batch's mean L0.
WHOLE_BATCH = True


def apply(z: Latents, arrays: Arrays, numbers: Numbers, *, config: SAEConfig) -> Sparse:
    """f, and the penalty `l0_loss` where the config weighs it."""
    theta, width = arrays["theta"][None, :], numbers["bandwidth"]
    on = z > lax.stop_gradient(theta)
    near = jnp.abs(z - theta) < width / 2
    # 0, with the gradient -1 / width where z is near theta.
    rise = lax.stop_gradient(near / width) * (lax.stop_gradient(theta) - theta)
    f = jnp.where(on, z, 0) + lax.stop_gradient(theta) * rise
    if not config.l0:
        return Sparse(f, on)
    l0, target = jnp.sum(on + rise, axis=-1), numbers["target_l0"]
    wanted = jnp.where(target > 0, target, 1.0)
    excess = jnp.broadcast_to(jnp.square(jnp.mean(l0) / wanted - 1), l0.shape)
    return Sparse(f, on, {"l0_loss": jnp.where(target > 0, excess, l0)})


def encode(z: Latents, arrays: Arrays, *, config: SAEConfig) -> Latents:
    """f = z where z > theta; never negative, even where another library trained a theta
    below 0."""
    return jnp.where(z > jnp.maximum(arrays["theta"], 0)[None, :], z, 0)
