"""Strict settings for every test: no silent broadcasting between ranks."""

import jax
import pytest
from tiny_runs import (  # noqa: F401  fixtures, each made once a session
    extracted,
    shared_files,
    tiny_corpus,
    tiny_grid,
    tiny_model,
    tiny_rows,
    tiny_run,
)

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(autouse=True)
def leaves_the_shared_folders_alone():
    """A test that leaves traces in them breaks others, by their order."""
    before = shared_files()
    yield
    after = shared_files()
    assert {folder: after[folder] for folder in before} == before


@pytest.fixture
def key() -> jax.Array:
    """A PRNG key."""
    return jax.random.key(7)
