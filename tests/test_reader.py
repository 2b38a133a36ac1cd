"""A trained autoencoder in a notebook: what it takes, gives and refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from autoencoders import make, write
from tiny_runs import D_MODEL, D_SAE

import vsae_jax
from vsae_jax import runs
from vsae_jax.autoencoder import sae
from vsae_jax.autoencoder.reader import Reader
from vsae_jax.config import SAEConfig

CONFIG = SAEConfig(d_model=4, d_sae=8, k=2)


def reader(**settings) -> Reader:
    variables = sae.init(jax.random.key(0), CONFIG, scale=2.0, mean=np.arange(4.0))
    return Reader(variables, CONFIG, **settings)


def rows(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(*shape, 4)).astype(np.float32)


@pytest.mark.parametrize("layer_norm", [False, True])
def test_any_leading_axes_are_kept(layer_norm):
    own, x = reader(layer_norm=layer_norm), rows(2, 3)
    f = own.encode(x)
    assert f.shape == (2, 3, 8)
    x_hat = own.decode(f, rows=x)
    assert x_hat.shape == (2, 3, 4)
    flat = own.encode(x.reshape(6, 4))
    np.testing.assert_array_equal(f.reshape(6, 8), flat)
    np.testing.assert_allclose(own.encode(x[1, 2]), f[1, 2], atol=1e-6)
    np.testing.assert_allclose(
        own.decode(f[1, 2], rows=x[1, 2]), x_hat[1, 2], rtol=1e-5
    )


@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float16, np.float32, np.float64])
def test_numpy_and_jax_floats_are_the_same_rows(dtype):
    x = rows(5).astype(dtype)
    given = [x, x.astype(np.float32), jnp.asarray(x.astype(np.float32))]
    a, b, c = (np.asarray(reader().encode(one)) for one in given)
    np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(a, c)


def test_what_is_no_row_is_refused_in_one_line():
    own = reader()
    for wrong, said in (
        (rows(3).view(np.uint32), "of uint32, expected floats"),
        (np.zeros((3, 4), bool), "of bool"),
        ([[1, 2, 3, 4]], "vsae_jax.open_activations"),
        (np.zeros((3, 5), np.float32), r"shape \[3, 5\], expected d_model=4"),
        (np.float32(1), "expected d_model=4"),
    ):
        with pytest.raises(ValueError, match=said) as error:
            own.encode(wrong)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="expected d_sae=8"):
        own.decode(np.zeros((3, 4), np.float32))


def test_a_torch_tensor_is_named():
    torch = pytest.importorskip("torch")
    with pytest.raises(ValueError, match=r"torch tensor.*x.detach\(\)"):
        reader().encode(torch.zeros(3, 4))


def test_rows_are_centred_where_it_was_trained_so():
    residual = rows(2, 3)
    plain, centred = (reader(center=c).rows(residual) for c in (False, True))
    np.testing.assert_array_equal(plain, residual.reshape(6, 4))
    np.testing.assert_allclose(
        centred, plain - plain.mean(axis=1, keepdims=True), atol=1e-6
    )


def test_directions_are_what_a_latent_adds():
    own = reader()
    f = np.zeros(8, np.float32)
    without = own.decode(f)
    f[3] = 2
    np.testing.assert_allclose(
        own.decode(f) - without, 2 * own.directions[3], rtol=1e-5, atol=1e-6
    )


def test_it_can_be_traced_and_differentiated():
    own, x = reader(layer_norm=True), jnp.asarray(rows(3))
    traced = jax.jit(lambda one, x: one.decode(one.encode(x), rows=x))
    np.testing.assert_allclose(
        traced(own, x), own.decode(own.encode(x), rows=x), rtol=1e-5, atol=1e-6
    )
    gradient = jax.grad(lambda x: own.encode(x).sum())(x)
    assert np.isfinite(gradient).all() and np.any(gradient)


def test_load_and_open_run_give_the_same_thing(tiny_run):
    loaded, opened = vsae_jax.load(tiny_run), runs.open_run(tiny_run)
    x = np.ones((3, D_MODEL), np.float32)
    f = loaded.encode(x)
    np.testing.assert_array_equal(f, opened.encode(x))
    expected = jax.jit(sae.encode, static_argnames="config")
    np.testing.assert_array_equal(f, expected(opened.variables, x, config=opened.sae))
    assert loaded.sae == loaded.config == opened.sae
    assert repr(loaded) == repr(opened)


def test_shards_are_read_as_what_they_hold(tiny_run, tiny_rows):
    opened = runs.open_run(tiny_run)
    x = vsae_jax.open_activations(tiny_rows).rows(0, 5)
    assert opened.encode(x).shape == (5, D_SAE)
    stored = x.astype(jnp.bfloat16).view(np.uint16)
    with pytest.raises(ValueError, match="raw bfloat16 bits"):
        opened.encode(stored)


def test_a_layer_that_is_not_known_is_said(tmp_path):
    loaded = vsae_jax.load(write(make(data={}), "openai", tmp_path / "o"))
    with pytest.raises(ValueError, match="not known which layer"):
        loaded.reader.layer
    assert "block" not in repr(loaded.reader)
