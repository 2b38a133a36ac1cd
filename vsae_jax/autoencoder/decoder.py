"""The decoder: x_hat_n = f @ w_dec + b_dec."""

from jaxtyping import Array, Float

from vsae_jax.autoencoder.arrays import ArraySpec, unit_rows
from vsae_jax.autoencoder.encoder import Params
from vsae_jax.autoencoder.matmul import affine, plain_affine
from vsae_jax.config import SAEConfig

ARRAYS = {
    "w_dec": ArraySpec(
        ("d_sae", "d_model"), start=unit_rows, times="decoder_init_norm"
    ),
    "b_dec": ArraySpec(("d_model",)),
}


def reconstruct(
    params: Params, f: Float[Array, "batch d_sae"], *, config: SAEConfig
) -> Float[Array, "batch d_model"]:
    """x_hat_n `[batch, d_model]`, in normalised units."""
    product = plain_affine if config.top_k == "lax" else affine
    return product(f, params["w_dec"], params["b_dec"], config.dtype)
