"""The encoder: mu = (x_n - b_dec where subtract_b_dec) @ w_enc + b_enc, then relu.

`head` is such an affine map of the encoder's input; a learned variance has another one.
With a gate path (gate.py) this map is the gate's, and mu a second one by the same
weights.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from vsae_jax.autoencoder import gate
from vsae_jax.autoencoder.arrays import ArraySpec, Latents, Rows, transpose_of
from vsae_jax.autoencoder.matmul import affine, plain_affine, product
from vsae_jax.config import SAEConfig

Params = Mapping[str, Array]

ARRAYS = {
    "w_enc": ArraySpec(("d_model", "d_sae"), start=transpose_of("w_dec")),
    "b_enc": ArraySpec(("d_sae",), in_latents=True),
}


class Encoded(NamedTuple):
    """mu, after the relu if there is one, and g of a gate path, or else None."""

    mu: Latents
    g: Latents | None


def encoded(params: Params, x_n: Rows, *, config: SAEConfig) -> Encoded:
    """mu and g of normalised rows."""
    mu, g = head(params, x_n, weight="w_enc", bias="b_enc", config=config), None
    if config.gate == "path":
        mu, g = gate.magnitude(params, mu), mu
    return Encoded(jax.nn.relu(mu) if config.relu else mu, g)


def head(
    params: Params, x_n: Rows, *, weight: str, bias: str, config: SAEConfig
) -> Latents:
    """(x_n - b_dec where it is subtracted) @ weight + bias, `[batch, d_sae]`."""
    w, b, b_dec = params[weight], params[bias], params["b_dec"]
    if config.top_k == "lax":  # the plain reference: everything by autodiff
        x_in = x_n - b_dec[None, :] if config.subtract_b_dec else x_n
        return plain_affine(x_in, w, b, config.dtype)
    if config.subtract_b_dec:
        x_n = x_n - lax.stop_gradient(b_dec)[None, :]
        b = _carry(b, b_dec, lax.stop_gradient(w))
    return affine(x_n, w, b, config.dtype)


@jax.custom_vjp
def _carry(
    b: Float[Array, " d_sae"],
    b_dec: Float[Array, " d_model"],
    w: Float[Array, "d_model d_sae"],
) -> Float[Array, " d_sae"]:
    """b, but its gradient g also gives b_dec the gradient -w g. That is the gradient
    of (x - b_dec) w + b, computed from one vector rather than from every row."""
    del b_dec, w
    return b


_carry.defvjp(
    lambda b, b_dec, w: (b, w),
    lambda w, g: (g, -product(w, g), jnp.zeros_like(w)),
)
