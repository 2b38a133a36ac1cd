"""Every selection keeps exactly what jax.lax.top_k keeps."""

from functools import cache, partial

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vsae_jax.autoencoder import selection_kernel, sparsity

# JAX says that it means to leave the kernel's way to a GPU for another one.
pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend")


def reference(z: np.ndarray, k: int) -> np.ndarray:
    """Indices by (value descending, index ascending), in NumPy."""
    order = np.argsort(-z.astype(np.float64), axis=1, kind="stable")
    mask = np.zeros(z.shape, bool)
    np.put_along_axis(mask, order[:, :k], True, axis=1)
    return mask


def inputs(name: str, rng: np.random.Generator) -> np.ndarray:
    z = rng.normal(size=(32, 96)).astype(np.float32)
    return {
        "random": z,
        "tied": np.round(z),
        "all equal": np.zeros_like(z),
        "negative": -np.abs(z) - 1,
        "after relu": np.maximum(z - 1, 0),
        "signed zeros": np.where(z > 0, 0.0, -0.0).astype(np.float32),
        "tiny and huge": (z * 10.0 ** rng.integers(-44, 37, z.shape)).astype("f4"),
    }[name]


@cache
def compiled(name: str, *, backend: str = "cpu", **options):
    """A selection, compiled once for all that are given it; the backend is looked at
    while it is traced."""

    def select(z, k):
        return getattr(sparsity, name)(z, k, **options)

    return jax.jit(select)


CASES = (
    "random",
    "tied",
    "all equal",
    "negative",
    "after relu",
    "signed zeros",
    "tiny and huge",
)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("k", [1, 7, 95, 96])
def test_selections_are_exact(name, k):
    z = inputs(name, np.random.default_rng(0))
    expected = reference(z, k)
    lax_mask = compiled("top_k_lax", k_max=96)(z, k)
    count_mask = compiled("top_k_count")(z, k)
    if name != "signed zeros":  # lax.top_k may rank -0 below 0; the values are equal
        np.testing.assert_array_equal(lax_mask, expected)
    np.testing.assert_array_equal(count_mask, expected)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("k", [1, 7, 95, 96])
@pytest.mark.parametrize("backend", ["cpu", "gpu"])
def test_selections_of_a_whole_batch_are_exact(name, k, backend, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    z = inputs(name, np.random.default_rng(0))
    expected = reference(z.reshape(1, -1), k * len(z)).reshape(z.shape)
    if name != "signed zeros":
        lax_mask = compiled("batch_top_k_lax", k_max=96)(z, k)
        np.testing.assert_array_equal(lax_mask, expected)
    count_mask = compiled("batch_top_k_count", backend=backend)(z, k)
    np.testing.assert_array_equal(count_mask, expected)
    f, mask = compiled("keep_batch_top_k", backend=backend, k_max=96)(z, k)
    np.testing.assert_array_equal(mask, expected)
    np.testing.assert_array_equal(f, np.where(expected, z, 0))


def test_bfloat16_and_ragged_batches():
    z = jnp.asarray(np.random.default_rng(1).normal(size=(5, 64)), jnp.bfloat16)
    mask = sparsity.top_k_count(z, 9)
    np.testing.assert_array_equal(mask, reference(np.asarray(z, np.float32), 9))
    np.testing.assert_array_equal(mask, sparsity.top_k_lax(z, 9, k_max=9))


select_jitted = jax.jit(partial(sparsity.keep_top_k, k_max=24))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 24), st.integers(1, 4))
def test_exactly_k_stay(seed, k, levels):
    z = np.random.default_rng(seed).integers(-levels, levels + 1, (16, 24))
    f, mask = select_jitted(jnp.asarray(z, jnp.float32), jnp.int32(k))
    assert (mask.sum(axis=1) == k).all()
    np.testing.assert_array_equal(mask, reference(z, k))
    np.testing.assert_array_equal(f, np.where(mask, z, 0))


@pytest.mark.parametrize("method", ["auto", "lax"])
def test_k_may_be_traced(method):
    z = jax.random.normal(jax.random.key(0), (16, 40))

    traces = []

    @jax.jit
    def select(k):
        traces.append(k)
        return sparsity.keep_top_k(z, k, k_max=20, method=method)[1]

    for k in (1, 13, 20):
        np.testing.assert_array_equal(select(jnp.int32(k)), reference(np.array(z), k))
    assert len(traces) == 1


def test_magnitude_keeps_the_sign():
    z = jnp.array([[1.0, -3.0, 2.0, 0.5]])
    f, _ = sparsity.keep_top_k(z, 2, k_max=2, selection="magnitude")
    np.testing.assert_array_equal(f, [[0.0, -3.0, 2.0, 0.0]])


def test_gradient_flows_through_the_selected_only(key):
    z = jax.random.normal(key, (16, 32))
    weight = jax.random.normal(jax.random.key(1), (16, 32))

    def total(z, method):
        f, _ = sparsity.keep_top_k(z, 5, k_max=5, method=method)
        return jnp.sum(f * weight)

    expected = jnp.where(reference(np.array(z), 5), weight, 0)
    for method in ("auto", "lax"):
        np.testing.assert_array_equal(jax.grad(total)(z, method), expected)


def test_dead_latents():
    silent = jnp.array([0, 4, 5, 6])
    np.testing.assert_array_equal(
        sparsity.dead_latents(silent, jnp.int32(5)), [False, False, True, True]
    )


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("k", [1, 7, 95])
def test_the_way_of_a_gpu_is_exact(name, k, monkeypatch):
    """Four bits a pass; here on the CPU, which computes the same."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    z = inputs(name, np.random.default_rng(0))
    mask = compiled("top_k_count", backend="gpu")(z, k)
    np.testing.assert_array_equal(mask, reference(z, k))


@pytest.mark.parametrize("width", [128, 96, 33, 1])
@pytest.mark.parametrize("name", CASES)
def test_the_kernel_is_exact(name, width):
    """On a CPU interpreted."""
    z = np.resize(inputs(name, np.random.default_rng(0)), (len(CASES), width))
    for k in {1, min(7, width), max(width - 1, 1), width}:
        mask = compiled("top_k_count", kernel=True)(z, k)
        np.testing.assert_array_equal(mask, reference(z, k), err_msg=str(k))


@pytest.mark.parametrize("most", [2**31 - 1, 3 * 5 * 64 - 1])
def test_the_kernel_takes_arms(most, monkeypatch):
    """At once, or one after another where there are too many values."""
    monkeypatch.setattr(selection_kernel, "MOST_VALUES", most)
    z = np.random.default_rng(2).normal(size=(3, 5, 64)).astype("f4")
    z[1] = np.round(z[1])
    k = np.array([4, 20, 64])
    select = jax.jit(jax.vmap(partial(sparsity.top_k_count, kernel=True)))
    masks = select(jnp.asarray(z), jnp.asarray(k))
    for arm in range(3):
        np.testing.assert_array_equal(masks[arm], reference(z[arm], int(k[arm])))
    # One z and a k each, as arms on a shared encoder would have.
    masks = jax.vmap(lambda k: sparsity.top_k_count(z[1], k, kernel=True))(k)
    for arm in range(3):
        np.testing.assert_array_equal(masks[arm], reference(z[1], int(k[arm])))


@pytest.mark.parametrize("width", [2048, 3000, 8192])
def test_the_kernel_is_lowered_for_cuda(width):
    """By JAX; Triton's own compiler is part of the GPU's plugin."""
    (device, *_), kind = jax.devices(), "NVIDIA H200"
    kind = device.device_kind if device.platform == "gpu" else kind
    gpu = jax.sharding.AbstractDevice(kind, 132, "gpu")
    mesh = jax.sharding.AbstractMesh((1,), ("gpus",), abstract_device=gpu)
    shapes = (jax.ShapeDtypeStruct(s, d) for s, d in (((64, width), "f4"), ((), "i4")))
    target = jax.export.DisabledSafetyCheck.custom_call("__gpu$xla.gpu.triton")
    with jax.sharding.use_abstract_mesh(mesh):
        lowered = jax.export.export(
            jax.jit(partial(sparsity.keep_top_k, k_max=64, method="kernel")),
            platforms=["cuda"],
            disabled_checks=[target],
        )(*shapes)
    assert lowered.platforms == ("cuda",)
    assert lowered.mlir_module().count("xla.gpu.triton") == 1


def test_rows_in_blocks_and_arms_at_once():
    """Enough rows for several blocks in every loop; ties in some of them only."""
    z = np.random.default_rng(2).normal(size=(3, 1024, 512)).astype("f4")
    z[1, ::7] = np.round(z[1, ::7])
    k = jnp.asarray([4, 100, 511])
    masks = jax.jit(jax.vmap(sparsity.top_k_count))(jnp.asarray(z), k)
    for arm in range(3):
        expected = reference(z[arm], int(k[arm]))
        np.testing.assert_array_equal(masks[arm], expected)
        alone = jax.jit(sparsity.top_k_count)(jnp.asarray(z[arm]), k[arm])
        np.testing.assert_array_equal(alone, expected)
