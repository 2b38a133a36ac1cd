"""The gate, by which z is multiplied between the posterior and the sparsifier.

    path    1 where g = (x_n - b_dec) @ w_enc + b_enc is above 0, else 0. mu is then
            that of a second path by the same weights, exp(r_mag) (g - b_enc) + b_mag
            (Rajamanoharan et al. 2024a)
    sigma   1 - sigma of a learned variance: closed where the posterior is the prior
            (Lu et al. 2025)

The step of `path` has no gradient. Two penalties train it: the L1 norm of relu(g), and
the error of reconstructing x from relu(g) with a decoder that this error does not
train. The KL closes gates of `sigma`; at evaluation a gate of at most `closed_below`
counts as closed.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from vsae_jax.autoencoder.arrays import ArraySpec, Latents, PerRow, Rows
from vsae_jax.autoencoder.matmul import affine, plain_affine
from vsae_jax.config import SAEConfig

ARRAYS: dict[str, dict[str, ArraySpec]] = {
    "none": {},
    "path": {
        "r_mag": ArraySpec(("d_sae",)),
        "b_mag": ArraySpec(("d_sae",), in_latents=True),
    },
    "sigma": {},
}


def magnitude(params: Mapping[str, Array], g: Latents) -> Latents:
    """mu of the second path, from the first one's g."""
    by_weights = g - params["b_enc"][None, :]
    return jnp.exp(params["r_mag"])[None, :] * by_weights + params["b_mag"][None, :]


def gated(
    z: Latents,
    g: Latents | None,
    log_var: Latents | None,
    *,
    config: SAEConfig,
    training: bool,
) -> Latents:
    """z times the gate, which `path` takes from `g` and `sigma` from `log_var`."""
    if g is not None:
        return jnp.where(g > 0, z, 0)
    if config.gate != "sigma" or log_var is None:
        return z
    opening = 1 - jnp.exp(0.5 * log_var)
    if training:
        return opening * z
    return jnp.where(opening > config.closed_below, opening * z, 0)


def l1_norm(g: Latents) -> PerRow:
    """||relu(g)||_1."""
    return jnp.sum(jax.nn.relu(g), axis=-1)


def reconstruction(
    params: Mapping[str, Array], g: Latents, *, config: SAEConfig
) -> Rows:
    """x_hat_n from relu(g), by the decoder, which gets no gradient from it."""
    w_dec, b_dec = (lax.stop_gradient(params[name]) for name in ("w_dec", "b_dec"))
    product = plain_affine if config.top_k == "lax" else affine
    return product(jax.nn.relu(g), w_dec, b_dec, config.dtype)
