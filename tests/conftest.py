"""Strict settings for every test: no silent broadcasting between ranks; and what JAX
compiled once in a session is not compiled again."""

import atexit
import os
import shutil
import tempfile

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

_programs = tempfile.mkdtemp(prefix="vsae_jax_programs_")
atexit.register(shutil.rmtree, _programs, ignore_errors=True)
jax.config.update("jax_compilation_cache_dir", _programs)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
# Processes that tests start read what is there and write nothing: JAX writes in place,
# and one that is killed would leave half a program.
os.environ["JAX_COMPILATION_CACHE_DIR"] = _programs
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "1e9"


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
