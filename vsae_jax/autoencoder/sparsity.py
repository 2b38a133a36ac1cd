"""Which latents stay: exact top-k selection, and which latents are dead.

`top_k_lax` is the reference: `jax.lax.top_k`, a sort for most shapes. `top_k_count`
finds the k-th value by counting instead, and keeps exactly the same latents. So does
the GPU kernel, which is used if it is asked for and the latents are on one device.
"""

import math
import os
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, UInt32

from vsae_jax.autoencoder.arrays import Latents, Mask, PerRow
from vsae_jax.autoencoder.matmul import column_counts
from vsae_jax.autoencoder.selection_kernel import MOST_LATENTS, MOST_VALUES, kth_key
from vsae_jax.system import mesh

TopK = Literal["auto", "lax", "kernel"]
Count = int | Int[Array, ""]

# A block of rows fits into a core's cache; blocks of several rows waste less time
# between passes. Each of at most this many loops over blocks has a core of its own.
_CPU_BLOCK_BYTES, _CPU_LOOPS = 2**19, 8


def keep_top_k(
    z: Latents,
    k: Count,
    *,
    k_max: int,
    selection: Literal["value", "magnitude"] = "value",
    method: TopK = "auto",
) -> tuple[Latents, Mask]:
    """f = z where z is among its row's k largest, else 0; and the mask of those.

    Exactly k stay; of equal values the lowest indices stay, as with `jax.lax.top_k`.
    `k` may be traced, up to the static `k_max`. `magnitude` ranks by |z| and keeps the
    sign, as the released code does. z must be finite.
    """
    rank = jnp.abs(z) if selection == "magnitude" else z
    if method == "lax":
        mask = top_k_lax(rank, k, k_max=k_max)
    else:
        mask = top_k_count(lax.stop_gradient(rank), k, kernel=method == "kernel")
    return jnp.where(mask, z, 0), mask


def top_k_lax(z: Latents, k: Count, *, k_max: int) -> Mask:
    """The mask of each row's k largest values by `jax.lax.top_k` of width k_max."""
    _, index = lax.top_k(z, k_max)
    keep = jnp.broadcast_to(jnp.arange(k_max) < k, index.shape)
    row = jnp.arange(z.shape[0])[:, None]
    return jnp.zeros(z.shape, bool).at[row, index].set(keep)


def top_k_count(z: Latents, k: Count, *, kernel: bool = False) -> Mask:
    """The mask of each row's k largest values: those above the k-th, and the first ones
    by index of those equal to it, k in all."""
    z = z.astype(jnp.float32)
    k = jnp.asarray(k, jnp.int32)
    fits = z.shape[1] <= MOST_LATENTS and z.size <= MOST_VALUES
    if kernel and fits and not mesh.is_split():
        key, last = kth_key(z, k)
        kth = _value(key)
    else:
        kth, last = _by_blocks(z, k)
    tied = (z == kth[:, None]) & (jnp.arange(z.shape[1])[None, :] <= last[:, None])
    return (z > kth[:, None]) | tied


def keep_batch_top_k(
    z: Latents, k: Count, *, k_max: int, method: TopK = "auto"
) -> tuple[Latents, Mask]:
    """f = z where z is among the batch * k largest of all of z, else 0; and the mask.

    Exactly batch * k stay; of equal values those of the lowest rows, then indices. `k`
    may be traced, up to the static `k_max`. z must be finite, with fewer than 2^31
    values.
    """
    if method == "lax":
        mask = batch_top_k_lax(z, k, k_max=k_max)
    else:
        mask = batch_top_k_count(lax.stop_gradient(z), k)
    return jnp.where(mask, z, 0), mask


def batch_top_k_lax(z: Latents, k: Count, *, k_max: int) -> Mask:
    """The mask of the batch * k largest values by `jax.lax.top_k` of all of them."""
    kept = jnp.asarray(k) * len(z)
    return top_k_lax(z.reshape(1, -1), kept, k_max=k_max * len(z)).reshape(z.shape)


def batch_top_k_count(z: Latents, k: Count) -> Mask:
    """The mask of the batch * k largest values: those above the last of them, and the
    first ones by row and index of those equal to it, batch * k in all. No row moves to
    another device, only counts are added up."""
    z = z.astype(jnp.float32)
    kept = jnp.asarray(k, jnp.int32) * len(z)
    start = jnp.uint32(0), jnp.int32(z.size)
    last, count = _bisected(
        lambda value: jnp.sum(z >= value, dtype=jnp.int32), start, kept
    )
    rows, width = z.shape
    whole, cut, stays = lax.cond(
        count > kept,
        lambda: _cut_ties_of_batch(z, last, kept),
        lambda: (jnp.ones(rows, bool), jnp.zeros(rows, bool), jnp.zeros(width, bool)),
    )
    tied = whole[:, None] | (cut[:, None] & stays[None, :])
    return (z > last) | ((z == last) & tied)


def compiler_options() -> dict[str, str] | None:
    """XLA's options for what is compiled around `keep_top_k`: without them it would, on
    a CPU, store every comparison of a counting pass before adding them up."""
    if jax.default_backend() != "cpu":
        return None
    return {"xla_disable_hlo_passes": "tree_reduction_rewriter"}


def dead_latents(
    rows_since_fired: Int[Array, " d_sae"], dead_after: Int[Array, ""]
) -> Bool[Array, " d_sae"]:
    """Latents that have not fired in the last `dead_after` rows."""
    return rows_since_fired >= dead_after


def _by_blocks(z: Latents, k: Int[Array, ""]) -> tuple[PerRow, Int[Array, " batch"]]:
    """`_kth_value`; on one CPU device a block of rows at a time, in independent loops,
    which XLA runs in parallel."""
    n, width = z.shape
    rows = math.gcd(n, max(2 ** round(math.log2(_CPU_BLOCK_BYTES / 4 / width)), 1))
    if jax.default_backend() != "cpu" or mesh.is_split() or rows < 8:
        return _kth_value(z, k)
    loops = min(os.cpu_count() or 1, _CPU_LOOPS, n // rows)
    parts = [
        lax.map(
            lambda start: _kth_value(lax.dynamic_slice_in_dim(z, start, rows), k),
            jnp.asarray(starts, jnp.int32),
        )
        for starts in np.array_split(np.arange(0, n, rows), loops)
    ]
    kth, last = (jnp.concatenate([p[i].ravel() for p in parts]) for i in range(2))
    return kth, last


def _kth_value(
    z: Float[Array, "rows d_sae"], k: Int[Array, ""]
) -> tuple[Float[Array, " rows"], Int[Array, " rows"]]:
    """The k-th largest value of each row, and the last index that is kept among the
    values equal to it."""
    rows, width = z.shape
    start = jnp.zeros(rows, jnp.uint32), jnp.full(rows, width, jnp.int32)
    value, count = _bisected(
        lambda value: jnp.sum(z >= value[:, None], axis=1, dtype=jnp.int32), start, k
    )
    return value, _cut_ties(z, value, count, k)


def _bisected(
    reach: Callable[[Array], Array], start: tuple[Array, Array], k: Int[Array, ""]
) -> tuple[Float[Array, "*sets"], Int[Array, "*sets"]]:
    """The k-th largest value of each set of numbers, and how many are not less, by
    bisection on the bits of the value. `reach` counts the numbers that are not less
    than a value; `start` is 0 and the size of each set.

    On a CPU one bit per pass, until every set has exactly k. Elsewhere four bits per
    pass and always all of them: on a GPU, asking whether to stop would be slower.
    """
    if jax.default_backend() == "cpu":
        _, (kth, count) = lax.while_loop(
            lambda carry: (carry[0] >= 0) & jnp.any(carry[1][1] != k),
            lambda carry: (carry[0] - 1, _refine(reach, k, *carry[1], carry[0], 1)),
            (jnp.int32(31), start),
        )
    else:
        kth, count = start
        for shift in range(28, -4, -4):
            kth, count = _refine(reach, k, kth, count, jnp.int32(shift), 4)
    return _value(kth), count


def _refine(
    reach: Callable[[Array], Array],
    k: Int[Array, ""],
    kth: UInt32[Array, "*sets"],
    count: Int[Array, "*sets"],
    shift: Int[Array, ""],
    bits: int,
) -> tuple[UInt32[Array, "*sets"], Int[Array, "*sets"]]:
    """Sets `bits` bits of `kth`, from bit `shift` up, to the largest number that k
    values reach. A set that has exactly k already is left as it is."""
    found, unit = count == k, jnp.uint32(1) << shift.astype(jnp.uint32)
    base = kth
    for digit in range(1, 2**bits):
        tried = base | (unit * digit)
        reached = reach(_value(tried))
        fits = (reached >= k) & ~found
        kth = jnp.where(fits, tried, kth)
        count = jnp.where(fits, reached, count)
    return kth, count


def _value(key: UInt32[Array, "*sets"]) -> Float[Array, "*sets"]:
    """The float of a key: unsigned integers in the order of the floats from -inf."""
    key = jnp.maximum(key, jnp.uint32(0x007FFFFF))
    bits = jnp.where(key >> 31 == 1, key & jnp.uint32(2**31 - 1), ~key)
    return lax.bitcast_convert_type(bits, jnp.float32)


def _cut_ties(
    z: Float[Array, "rows d_sae"],
    kth: Float[Array, " rows"],
    count: Int[Array, " rows"],
    k: Int[Array, ""],
) -> Int[Array, " rows"]:
    """The last index that is kept among values equal to the k-th; d_sae in rows where
    exactly k values reach it. With latents on several devices, each counts its own.

    A loop of at most one iteration, because under vmap a cond would always compute its
    branch. The sign changes to keep XLA from moving the iteration out of the loop.
    """
    rows, width = z.shape
    none = jnp.full(rows, width, jnp.int32)

    def cut(carry):
        _, negative, _ = carry
        above = jnp.sum(z > -negative[:, None], axis=1, dtype=jnp.int32)
        tied = (z == -negative[:, None]).reshape(rows, mesh.shards("latents"), -1)
        place = jnp.cumsum(tied, axis=2, dtype=jnp.int32)
        before = jnp.cumsum(place[:, :, -1], axis=1) - place[:, :, -1]
        enough = (place + before[:, :, None]).reshape(rows, width) >= (k - above)[
            :, None
        ]
        index = jnp.arange(width, dtype=jnp.int32)[None, :]
        last = jnp.min(jnp.where(enough, index, width), axis=1)
        return jnp.bool_(False), -negative, jnp.where(count > k, last, none)

    return lax.while_loop(lambda c: c[0], cut, (jnp.any(count > k), -kth, none))[2]


def _cut_ties_of_batch(
    z: Float[Array, "rows d_sae"], last: Float[Array, ""], kept: Int[Array, ""]
) -> tuple[Bool[Array, " rows"], Bool[Array, " rows"], Bool[Array, " d_sae"]]:
    """Which values equal to the last one are kept: the rows in which all are, the one
    row (if any) in which only some are, and the latents that are kept there."""
    left = kept - jnp.sum(z > last, dtype=jnp.int32)
    tied = z == last
    count = jnp.sum(tied, axis=1, dtype=jnp.int32)
    through = jnp.cumsum(count)
    before = through - count
    cut = (before < left) & (left < through)
    place = jnp.cumsum(column_counts(tied & cut[:, None]) > 0, dtype=jnp.int32)
    return through <= left, cut, place <= left - jnp.sum(jnp.where(cut, before, 0))
