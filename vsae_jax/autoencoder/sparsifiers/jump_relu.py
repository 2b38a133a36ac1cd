"""f = z where z > theta, one threshold a latent (Rajamanoharan et al. 2024b).

The step at theta has no gradient: theta gets that of a step which rises over a width
`bandwidth` (straight through a rectangle), z only f's own. The number of latents that
are on is a penalty, weighed by --l0: itself, or with --target_l0 the square of
L0 / target - 1, L0 the batch's mean.

Files hold theta, as those of other libraries do; training its logarithm, as the paper
does: theta stays above 0.
"""

from collections.abc import Mapping

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from vsae_jax.autoencoder.arrays import ArraySpec, ones
from vsae_jax.autoencoder.sparsifiers.sparse import Numbers, Sparse
from vsae_jax.config import SAEConfig

ARRAYS = {
    "theta": ArraySpec(
        ("d_sae",), start=ones, times="threshold_init", in_latents=True, log=True
    )
}
BUFFERS: dict[str, ArraySpec] = {}
THRESHOLD = "theta"
# For the batch's mean L0.
WHOLE_BATCH = True


def apply(
    z: Float[Array, "batch d_sae"],
    arrays: Mapping[str, Array],
    numbers: Numbers,
    *,
    config: SAEConfig,
) -> Sparse:
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


def encode(
    z: Float[Array, "batch d_sae"], arrays: Mapping[str, Array], *, config: SAEConfig
) -> Float[Array, "batch d_sae"]:
    """f = z where z > theta; never below 0, whatever theta another library trained."""
    return jnp.where(z > jnp.maximum(arrays["theta"], 0)[None, :], z, 0)
