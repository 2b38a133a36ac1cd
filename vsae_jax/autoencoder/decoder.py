"""The decoder: x_hat_n = f @ w_dec + b_dec.

A nested decoder (Bussmann et al. 2025) is also trained to reconstruct x from its first
latents alone: the sum of those errors is a penalty. At evaluation it is like any other.
"""

import jax.numpy as jnp

from vsae_jax.autoencoder.arrays import ArraySpec, Latents, Rows, unit_rows
from vsae_jax.autoencoder.encoder import Params
from vsae_jax.autoencoder.matmul import affine, plain_affine
from vsae_jax.config import SAEConfig

ARRAYS = {
    "w_dec": ArraySpec(
        ("d_sae", "d_model"), start=unit_rows, times="decoder_init_norm"
    ),
    "b_dec": ArraySpec(("d_model",)),
}


def reconstruct(params: Params, f: Latents, *, config: SAEConfig) -> Rows:
    """x_hat_n `[batch, d_model]`, in normalised units."""
    return prefixes(params, f, (config.d_sae,), config=config)[0]


def prefixes(
    params: Params, f: Latents, widths: tuple[int, ...], *, config: SAEConfig
) -> list[Rows]:
    """x_hat_n from the first `width` latents, for each of the rising widths. Each adds
    its further latents to the reconstruction before it."""
    product = plain_affine if config.top_k == "lax" else affine
    start, bias, so_far = 0, params["b_dec"], None
    found = []
    for width in widths:
        part = slice(start, width)
        more = product(f[:, part], params["w_dec"][part], bias, config.dtype)
        so_far = more if so_far is None else so_far + more
        found.append(so_far)
        start, bias = width, jnp.zeros_like(bias)
    return found
