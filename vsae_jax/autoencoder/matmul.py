"""Affine maps with operands of a chosen dtype and float32 results.

On a CPU, XLA multiplies two bfloat16 matrices fast only where both are stored by rows.
It folds transpositions into the product, which is then computed in float32, five times
slower. `by_rows` stores a matrix anew, so that nothing is folded.
"""

from functools import partial
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

Dtype = Literal["float32", "bfloat16"]

# Columns moved together when a matrix is stored anew.
_TILE = 16


def plain_affine(
    x: Float[Array, "n i"], w: Float[Array, "i o"], b: Float[Array, " o"], dtype: Dtype
) -> Float[Array, "n o"]:
    """x @ w + b as one would write it, its gradients by autodiff: the reference."""
    return product(x.astype(dtype), w.astype(dtype)) + b[None, :]


def affine(
    x: Float[Array, "n i"], w: Float[Array, "i o"], b: Float[Array, " o"], dtype: Dtype
) -> Float[Array, "n o"]:
    """x @ w + b with operands of `dtype`, accumulated in float32; gradients likewise.

    Autodiff of a mixed product would instead multiply float32 by bfloat16. In float32
    the factors are not rounded; a GPU would by default, to TF32 with three digits.
    """
    return cast(Array, _affine(x, w, b, dtype))


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _affine(x: Array, w: Array, b: Array, dtype: Dtype) -> Array:
    w = w.astype(dtype)
    # The decoder, which is tall, arrives as the transpose of what training stores.
    w = by_rows(w) if w.shape[0] > w.shape[1] else w
    return product(x.astype(dtype), w) + b[None, :]


def by_rows(a: Float[Array, "n i"]) -> Float[Array, "n i"]:
    """`a`, stored by rows whatever it was made from, where that matters."""
    n, width = a.shape
    matters = a.dtype == jnp.bfloat16 and jax.default_backend() == "cpu"
    if not matters or width % _TILE or width == _TILE:
        return a
    tiles = a.reshape(n, width // _TILE, _TILE).transpose(1, 0, 2)
    return lax.optimization_barrier(tiles).transpose(1, 0, 2).reshape(n, width)


def column_sums(a: Float[Array, "n o"]) -> Float[Array, " o"]:
    """The sum over rows, in float32, as a matrix product: XLA's own sum on a CPU takes
    one column after another. With sixteen equal rows, since a product with a single row
    would be computed in float32."""
    return product(jnp.ones((_TILE, len(a)), a.dtype), a)[0]


def column_counts(mask: Bool[Array, "n o"]) -> Float[Array, " o"]:
    """The number of True in each column. The ones are made from bits, because XLA
    converts slowly."""
    one = jnp.uint16(0x3F80)
    bits = jnp.where(mask, one, jnp.uint16(0))
    return column_sums(lax.bitcast_convert_type(bits, jnp.bfloat16))


def product(a: Any, b: Any) -> Array:
    """a @ b of floating-point arrays, in float32. float32 operands are not rounded, as
    a GPU would by default, to TF32."""
    exact = a.dtype == jnp.float32
    precision = lax.Precision.HIGHEST if exact else None
    return jnp.matmul(a, b, precision=precision, preferred_element_type=jnp.float32)


def _forward(x: Array, w: Array, b: Array, dtype: Dtype) -> tuple[Array, Any]:
    return affine(x, w, b, dtype), (x, w)


def _backward(dtype: Dtype, saved: tuple[Array, Array], g: Array) -> tuple[Array, ...]:
    x, w = (a.astype(dtype) for a in saved)
    g = g.astype(dtype)
    # The barrier keeps XLA from folding the transposition after all.
    if x.size <= g.size:
        dw = lax.optimization_barrier(product(by_rows(x.T), g))
    else:
        dw = lax.optimization_barrier(product(by_rows(g.T), x)).T
    return product(g, w.T), dw, column_sums(g)


_affine.defvjp(_forward, _backward)
