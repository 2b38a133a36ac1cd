"""Standard normal noise from a key, cheap enough to be drawn for every latent.

JAX's own generator costs as much as all of a step's matrix products on a CPU
(docs/decisions/model-and-training.md). Here a key gives two random words, with which
each element hashes its row and column. So the same key gives the same noise on any
device, however the batch is divided.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, Key, UInt32


def normal(
    key: Key[Array, ""],
    shape: tuple[int, int],
    *,
    first_row: int | Int[Array, ""] = 0,
) -> Float[Array, "rows columns"]:
    """eps ~ N(0, I), float32 `[rows, columns]`: the rows from `first_row` on of the
    key's endless matrix. Each element has 23 random bits, so |eps| < 5.4. The key is
    consumed."""
    rows, columns = words(key, shape, first_row=first_row)
    return normal_of(mix(rows[:, None] ^ columns[None, :]))


class Words(NamedTuple):
    """What the noise of a row and of a column is hashed from."""

    rows: UInt32[Array, " rows"]
    columns: UInt32[Array, " columns"]


def words(
    key: Key[Array, ""],
    shape: tuple[int, int],
    *,
    first_row: int | Int[Array, ""] = 0,
) -> Words:
    """Those that `normal` draws from. The key is consumed."""
    row_word, column_word = jax.random.bits(key, (2,), jnp.uint32)
    place = jnp.arange(shape[0], dtype=jnp.uint32) + jnp.asarray(first_row, jnp.uint32)
    rows = mix(place + row_word)
    return Words(rows, mix(jnp.arange(shape[1], dtype=jnp.uint32) + column_word))


def mix(x: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """A bijection of 32-bit words whose every output bit depends on every input bit
    (the xorshift-multiply form, constants of C. Wellons' hash prospector)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x21F0AAAD)
    x = (x ^ (x >> 15)) * jnp.uint32(0xD35A2D97)
    return x ^ (x >> 15)


def normal_of(bits: UInt32[Array, "..."]) -> Float[Array, "..."]:
    """sqrt(2) erfinv(u), u uniform on the odd multiples of 2^-23 in (-1, 1)."""
    from_one_to_two = lax.bitcast_convert_type(
        (bits >> 9) | jnp.uint32(0x3F800000), jnp.float32
    )
    # Exact in float32. Subtracting 3 - 2^-23 would not be: u could be -1, eps -inf.
    u = (from_one_to_two - np.float32(1.5)) * 2 + np.float32(2**-23)
    return np.float32(np.sqrt(2)) * lax.erf_inv(u)
