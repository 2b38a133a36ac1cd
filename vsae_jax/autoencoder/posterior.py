"""The posterior q(z | x) = N(mu, s^2): no noise, s = 1, or s learned (paper 2.2.1)."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from vsae_jax.autoencoder import noise
from vsae_jax.autoencoder.arrays import ArraySpec, Latents, Rows
from vsae_jax.autoencoder.encoder import Params, head
from vsae_jax.config import SAEConfig

# The arrays of a learned variance; without one there are none.
ARRAYS = {
    "w_var": ArraySpec(("d_model", "d_sae")),
    "b_var": ArraySpec(("d_sae",)),
}


def log_variance(params: Params, x_n: Rows, *, config: SAEConfig) -> Latents | None:
    """log s^2 `[batch, d_sae]` of normalised rows; None where s is 1."""
    if config.variance == "fixed":
        return None
    return head(params, x_n, weight="w_var", bias="b_var", config=config)


def sample(
    key: Key[Array, ""],
    mu: Latents,
    log_var: Latents | None,
    *,
    noise_std: float | Float[Array, ""],
    first_row: int | Int[Array, ""] = 0,
) -> Latents:
    """z = mu + noise_std * s * eps with eps ~ N(0, I). The key is consumed."""
    eps = noise.normal(key, (mu.shape[0], mu.shape[1]), first_row=first_row)
    eps = eps if log_var is None else jnp.exp(0.5 * log_var) * eps
    return mu + noise_std * eps
