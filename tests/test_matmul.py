"""Affine maps: values and gradients, whatever the layout."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vsae_jax.autoencoder import matmul

# Rows and columns that do and do not divide into tiles, wide and tall.
SHAPES = [
    (64, 32, 48),
    (64, 48, 32),
    (33, 16, 5),
    (1, 7, 3),
    (40, 17, 64),
    (16, 16, 16),
]


def operands(n, i, o, dtype):
    rng = np.random.default_rng(n + i + o)
    arrays = (rng.normal(size=s) for s in ((n, i), (i, o), (o,), (n, o)))
    # Of the dtype's own precision, so that the products are exact in it.
    return [jnp.asarray(a, dtype).astype(jnp.float32) for a in arrays]


@pytest.mark.parametrize("n, i, o", SHAPES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("held", ["by rows", "transposed"])
def test_affine_and_its_gradients(n, i, o, dtype, held):
    x, w, b, g = operands(n, i, o, dtype)

    def value(x, w, b):
        w = w.T if held == "transposed" else w
        return jnp.sum(matmul.affine(x, w, b, dtype) * g)

    given = w.T if held == "transposed" else w
    got = jax.jit(jax.value_and_grad(value, argnums=(0, 1, 2)))(x, given, b)
    x, w, b, g = (np.asarray(a, np.float64) for a in (x, w, b, g))
    dw = x.T @ g
    expected = (
        np.sum((x @ w + b) * g),
        (
            g @ w.T,
            dw.T if held == "transposed" else dw,
            g.sum(0),
        ),
    )
    np.testing.assert_allclose(got[0], expected[0], rtol=1e-4)
    for ours, theirs in zip(got[1], expected[1], strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("shape", [(64, 32), (32, 64), (5, 48), (7, 16), (9, 7)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_by_rows_changes_no_value(shape, dtype):
    a = jnp.asarray(np.random.default_rng(0).normal(size=shape), dtype)
    np.testing.assert_array_equal(jax.jit(matmul.by_rows)(a), a)
    turned = jax.jit(lambda a: matmul.by_rows(a.T))(a)
    np.testing.assert_array_equal(turned, np.asarray(a).T)


def test_column_counts():
    mask = np.random.default_rng(1).random((300, 40)) < 0.3
    mask[:, 7] = False
    np.testing.assert_array_equal(matmul.column_counts(jnp.asarray(mask)), mask.sum(0))
