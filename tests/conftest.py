"""Strict settings for every test: no silent broadcasting between ranks."""

import jax
import pytest
from tiny_runs import (  # noqa: F401  fixtures, each made once a session
    extracted,
    tiny_corpus,
    tiny_grid,
    tiny_model,
    tiny_rows,
    tiny_run,
)

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def key() -> jax.Array:
    """A PRNG key."""
    return jax.random.key(7)
