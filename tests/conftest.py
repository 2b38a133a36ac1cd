"""Strict settings for every test: no silent broadcasting between ranks; and what JAX
has compiled once in a session is not compiled again."""

import os
import shutil
import tempfile

import jax
import pytest
from tiny_runs import (  # noqa: F401  fixtures, each made once a session
    changed,
    extracted,
    tiny_corpus,
    tiny_grid,
    tiny_model,
    tiny_rows,
    tiny_run,
)

jax.config.update("jax_numpy_rank_promotion", "raise")

# pytest-xdist's workers share the folder of the process that started them.
WORKER = "PYTEST_XDIST_WORKER" in os.environ
PROGRAMS = (
    os.environ["JAX_COMPILATION_CACHE_DIR"]
    if WORKER
    else tempfile.mkdtemp(prefix="vsae_jax_programs_")
)
jax.config.update("jax_compilation_cache_dir", PROGRAMS)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
# The processes that tests start read the programs and write none: JAX writes a file in
# place, and a process that is killed would leave half of one.
os.environ["JAX_COMPILATION_CACHE_DIR"] = PROGRAMS
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "1e9"
QUICK_TO_COMPILE = (
    "--xla_backend_optimization_level=0",
    "--xla_cpu_parallel_codegen_split_count=1",
    "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters=true",
)
# They begin first: a worker that came to one last would end long after the others.
LONGEST = {
    *("test_attached", "test_bad_input", "test_before_the_move", "test_evals_texts"),
    *("test_extract", "test_family", "test_gpu_way", "test_grid", "test_lm_families"),
    *("test_mesh", "test_readme", "test_train"),
}
# scikit-learn's threads spin while they wait for a core that another test works on.
os.environ["OMP_NUM_THREADS"] = "1"


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Workers for `-n auto`: a few for the whole suite, none for what is named."""
    whole = config.args_source is pytest.Config.ArgsSource.TESTPATHS
    return min(os.cpu_count() or 1, 4) if whole else 0


def pytest_configure(config: pytest.Config) -> None:
    """Most of a test's time is XLA making fast programs that run once: LLVM's passes,
    and MLIR's for each fusion. XLA's own passes, which decide what is computed, stay;
    the study and a GPU compile as users do."""
    on_gpu = "cuda" in os.environ.get("JAX_PLATFORMS", "")
    if config.option.markexpr != "study" and not on_gpu:
        flags = os.environ.get("XLA_FLAGS", ""), *QUICK_TO_COMPILE
        os.environ["XLA_FLAGS"] = " ".join(flags).strip()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.stem not in LONGEST)


def pytest_unconfigure():
    if not WORKER:
        shutil.rmtree(PROGRAMS, ignore_errors=True)


@pytest.fixture(autouse=True)
def leaves_the_shared_folders_alone():
    """A test that leaves traces in them breaks others, by their order."""
    yield
    assert not changed()


@pytest.fixture
def key() -> jax.Array:
    """A PRNG key."""
    return jax.random.key(7)
