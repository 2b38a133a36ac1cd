"""Strict settings for every test: no silent broadcasting between ranks."""

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def key() -> jax.Array:
    """A PRNG key."""
    return jax.random.key(7)
