"""The LayerNorm of each row that OpenAI's autoencoders and some of SAELens' imply."""

import jax.numpy as jnp
from jaxtyping import Array, Float

_EPS = 1e-5  # theirs, added to the standard deviation


def normalise_rows(
    x: Float[Array, "rows d_model"],
) -> tuple[
    Float[Array, "rows d_model"], Float[Array, "rows 1"], Float[Array, "rows 1"]
]:
    """(x - m) / (std + eps), m and std of each row, std unbiased; x_hat goes back by
    x_hat * std + m."""
    mean = jnp.mean(x, axis=-1, keepdims=True)
    std = jnp.std(x, axis=-1, keepdims=True, ddof=1)
    return (x - mean) / (std + _EPS), mean, std
