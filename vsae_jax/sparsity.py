"""Which latents stay: exact top-k selection, and which latents are dead.

`top_k_lax` is the reference: `jax.lax.top_k`, a sort for most shapes. `top_k_count`
finds the k-th value by counting instead, and keeps exactly the same latents.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, UInt32

# Rows whose keys stay in a core's cache during the counting passes.
_CPU_BLOCK_ROWS = 8
# A row is counted in this many slices of at least this width (see `_count`).
_CPU_SLICES, _CPU_WIDTH = 64, 32


def keep_top_k(
    z: Float[Array, "batch d_sae"],
    k: int | Int[Array, ""],
    *,
    k_max: int,
    selection: Literal["value", "magnitude"] = "value",
    method: Literal["auto", "lax"] = "auto",
) -> tuple[Float[Array, "batch d_sae"], Bool[Array, "batch d_sae"]]:
    """f = z where z is among its row's k largest, else 0; and the mask of those.

    Exactly k stay; of equal values the lowest index stays, as `jax.lax.top_k` does.
    `k` may be traced, up to the static `k_max`. `magnitude` ranks by |z| and keeps
    the sign (the released code). z is finite.
    """
    rank = jnp.abs(z) if selection == "magnitude" else z
    if method == "lax":
        mask = top_k_lax(rank, k, k_max=k_max)
    else:
        mask = top_k_count(lax.stop_gradient(rank), k)
    return jnp.where(mask, z, 0), mask


def top_k_lax(
    z: Float[Array, "batch d_sae"], k: int | Int[Array, ""], *, k_max: int
) -> Bool[Array, "batch d_sae"]:
    """The mask of each row's k largest values by `jax.lax.top_k` of width k_max."""
    _, index = lax.top_k(z, k_max)
    keep = jnp.broadcast_to(jnp.arange(k_max) < k, index.shape)
    row = jnp.arange(z.shape[0])[:, None]
    return jnp.zeros(z.shape, bool).at[row, index].set(keep)


def top_k_count(
    z: Float[Array, "batch d_sae"], k: int | Int[Array, ""]
) -> Bool[Array, "batch d_sae"]:
    """The mask of each row's k largest values, by bisection on the bits of the k-th.

    On a CPU a block of rows at a time, so that the passes run in cache.
    """
    keys = ordered_bits(z)
    if jax.default_backend() != "cpu" or z.shape[0] % _CPU_BLOCK_ROWS:
        return _mask_of_block(keys, k)
    blocks = keys.reshape(-1, _CPU_BLOCK_ROWS, keys.shape[-1])
    return lax.map(lambda block: _mask_of_block(block, k), blocks).reshape(z.shape)


def ordered_bits(z: Float[Array, "batch d_sae"]) -> UInt32[Array, "batch d_sae"]:
    """Unsigned integers in the order of the floats; -0 and 0 are the same."""
    z = z.astype(jnp.float32)
    bits = lax.bitcast_convert_type(jnp.where(z == 0, 0.0, z), jnp.uint32)
    negative = bits >> 31 == 1
    return jnp.where(negative, ~bits, bits | jnp.uint32(1 << 31))


def dead_latents(
    rows_since_fired: Int[Array, " d_sae"], dead_after: Int[Array, ""]
) -> Bool[Array, " d_sae"]:
    """Latents that have not fired in the last `dead_after` rows."""
    return rows_since_fired >= dead_after


def _mask_of_block(
    keys: UInt32[Array, "rows d_sae"], k: int | Int[Array, ""]
) -> Bool[Array, "rows d_sae"]:
    threshold, count = _threshold(keys, jnp.asarray(k, jnp.int32))
    at_least = keys >= threshold[:, None]
    return lax.cond(
        jnp.any(count > k),
        lambda: _cut_ties(keys, threshold, k),
        lambda: at_least,
    )


def _threshold(
    keys: UInt32[Array, "rows d_sae"], k: Int[Array, ""]
) -> tuple[UInt32[Array, " rows"], Int[Array, " rows"]]:
    """The largest threshold per row with at least k keys at or above it, and their
    count. Stops early once every row has exactly k."""

    def unfinished(carry):
        bit, _, count = carry
        return (bit >= 0) & jnp.any(count != k)

    def set_next_bit(carry):
        bit, threshold, count = carry
        tried = threshold | (jnp.uint32(1) << bit.astype(jnp.uint32))
        tried_count = _count(keys, tried)
        fits = (tried_count >= k) & (count != k)
        threshold = jnp.where(fits, tried, threshold)
        return bit - 1, threshold, jnp.where(fits, tried_count, count)

    rows, width = keys.shape
    start = (
        jnp.int32(31),
        jnp.zeros(rows, jnp.uint32),
        jnp.full(rows, width, jnp.int32),
    )
    _, threshold, count = lax.while_loop(unfinished, set_next_bit, start)
    return threshold, count


def _count(
    keys: UInt32[Array, "rows d_sae"], threshold: UInt32[Array, " rows"]
) -> Int[Array, " rows"]:
    """How many of a row's keys are at or above its threshold.

    On a CPU slices are added one to another: XLA would store the comparison of a whole
    row before it sums, which is four times slower (BUILD_NOTES.md).
    """
    hits = (keys >= threshold[:, None]).astype(jnp.int32)
    if jax.default_backend() != "cpu":
        return jnp.sum(hits, axis=1)
    width = max(_CPU_WIDTH, -(-keys.shape[1] // _CPU_SLICES))
    whole = keys.shape[1] // width * width
    sums = sum(hits[:, i : i + width] for i in range(0, whole, width))
    rest = jnp.sum(hits[:, whole:], axis=1)
    return rest + jnp.sum(sums, axis=1) if whole else rest


def _cut_ties(
    keys: UInt32[Array, "rows d_sae"],
    threshold: UInt32[Array, " rows"],
    k: int | Int[Array, ""],
) -> Bool[Array, "rows d_sae"]:
    """Of the keys equal to the threshold, the first ones by index up to k in all."""
    above = keys > threshold[:, None]
    tied = keys == threshold[:, None]
    room = k - jnp.sum(above, axis=1, keepdims=True, dtype=jnp.int32)
    place = jnp.cumsum(tied, axis=1, dtype=jnp.int32)
    # A row that stopped early has exactly k at or above its threshold: none is cut.
    return above | (tied & (place <= room))
