"""Matrix products with operands of a chosen dtype, float32 results."""

from functools import partial
from typing import Literal, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Dtype = Literal["float32", "bfloat16"]


def matmul(
    a: Float[Array, "n i"], b: Float[Array, "i o"], dtype: Dtype
) -> Float[Array, "n o"]:
    """a @ b with operands of `dtype`, accumulated in float32; its gradients likewise.

    Autodiff of a mixed product would instead multiply float32 by bfloat16. float32
    means float32: a GPU's default would be TF32, three digits.
    """
    return cast(Array, _matmul(a, b, dtype))


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _matmul(a: Array, b: Array, dtype: Dtype) -> Array:
    return jnp.matmul(
        a.astype(dtype),
        b.astype(dtype),
        precision=jax.lax.Precision.HIGHEST if dtype == "float32" else None,
        preferred_element_type=jnp.float32,
    )


def _forward(a: Array, b: Array, dtype: Dtype) -> tuple[Array, tuple[Array, Array]]:
    return matmul(a, b, dtype), (a, b)


def _backward(
    dtype: Dtype, saved: tuple[Array, Array], g: Float[Array, "n o"]
) -> tuple[Float[Array, "n i"], Float[Array, "i o"]]:
    a, b = saved
    return matmul(g, b.T, dtype), matmul(a.T, g, dtype)


_matmul.defvjp(_forward, _backward)
