"""A GPU kernel for the k-th value of each row: it reads the row once and keeps it in
registers while it counts. `sparsity.py` says what is selected.

Pallas, through Triton, imported where a kernel is asked for: it takes a while. On a CPU
it is interpreted, which is slow but right, for tests.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.custom_batching
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, UInt32

# Wider rows would not fit into registers; a kernel counts places with 31 bits.
MOST_LATENTS, MOST_VALUES = 2**16, 2**31 - 1
_VALUES_PER_THREAD, _THREADS_PER_WARP, _MOST_WARPS = 32, 32, 32


@jax.custom_batching.custom_vmap
def kth_key(
    z: Float[Array, "rows d_sae"], k: Int[Array, ""]
) -> tuple[UInt32[Array, " rows"], Int[Array, " rows"]]:
    """For each row the largest key that at least k values reach (keys are ordered as
    the values are), and the last index that is kept among the values equal to it: d_sae
    where exactly k reach it.

    z is finite and has at most MOST_VALUES values, MOST_LATENTS in a row. Under a vmap,
    arms are done together if all of them have no more than that, else one by one.
    """
    return _kth_key(z, k)


@kth_key.def_vmap
def _of_arms(
    arms: int, batched: Sequence[bool], z: Array, k: Array
) -> tuple[tuple[Array, Array], tuple[bool, bool]]:
    z, k = (
        a if each else jnp.broadcast_to(a, (arms, *a.shape))
        for a, each in zip((z, k), batched, strict=True)
    )
    if z.size <= MOST_VALUES:
        return jax.vmap(_kth_key)(z, k), (True, True)
    return lax.map(lambda one: kth_key(*one), (z, k)), (True, True)


def _kth_key(z: Array, k: Array) -> tuple[Array, Array]:
    interpreted = partial(_called, interpret=True)
    return lax.platform_dependent(z, k, cpu=interpreted, default=_called)


def _called(z: Array, k: Array, *, interpret: bool = False) -> tuple[Array, Array]:
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    rows, width = z.shape
    padded = pl.next_power_of_2(width)
    warps = max(padded // (_VALUES_PER_THREAD * _THREADS_PER_WARP), 1)
    one_row = pl.BlockSpec((None,), lambda row: (row,))
    key, last = pl.pallas_call(
        partial(_select_row, width=width),
        grid=(rows,),
        in_specs=[
            pl.BlockSpec((1,), lambda row: (0,)),
            pl.BlockSpec((None, padded), lambda row: (row, 0)),
        ],
        out_specs=[one_row, one_row],
        out_shape=[
            jax.ShapeDtypeStruct((rows,), jnp.uint32),
            jax.ShapeDtypeStruct((rows,), jnp.int32),
        ],
        compiler_params=triton.CompilerParams(num_warps=min(warps, _MOST_WARPS)),
        interpret=interpret,
        name="kth_key",
    )(k.reshape(1), z)
    return key, last


def _select_row(k_ref: Any, z_ref: Any, key_ref: Any, last_ref: Any, *, width: int):
    from jax.experimental.pallas import triton

    k = k_ref[0]
    index = lax.iota(jnp.int32, z_ref.shape[0])
    inside = index < width
    keys = _keys(triton.load(z_ref, mask=inside, other=0.0))
    # 0 is below every key that is tried.
    keys = jnp.where(inside, keys, jnp.uint32(0))

    def raise_key(carry):
        bit, key, count = carry
        tried = key | (jnp.uint32(1) << bit.astype(jnp.uint32))
        reached = _count(keys >= tried)
        key = jnp.where(reached >= k, tried, key)
        count = jnp.where(reached >= k, reached, count)
        return jnp.where(count == k, -1, bit - 1), key, count

    start = jnp.int32(31), jnp.uint32(0), jnp.int32(width)
    _, key, count = lax.while_loop(_has_bits, raise_key, start)
    tied = keys == key
    left = k - _count(keys > key)

    def raise_index(carry):
        bit, last = carry
        tried = last | (jnp.int32(1) << bit)
        before = _count(tied & (index < tried))
        return bit - 1, jnp.where(before < left, tried, last)

    # No iteration where exactly k values reach the key.
    first = jnp.minimum(count - k, 1) * (index.shape[0].bit_length() - 1) - 1
    _, last = lax.while_loop(_has_bits, raise_index, (first, jnp.int32(0)))
    key_ref[...] = key
    last_ref[...] = jnp.where(count > k, last, width)


def _has_bits(carry: Any) -> Array:
    return carry[0] >= 0


def _keys(z: Float[Array, " n"]) -> UInt32[Array, " n"]:
    """Unsigned integers in the order of the floats; both zeros have the same."""
    bits = lax.bitcast_convert_type(jnp.where(z == 0, 0.0, z), jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(2**31))


def _count(mask: Array) -> Int[Array, ""]:
    return jnp.sum(jnp.where(mask, jnp.int32(1), jnp.int32(0)))
