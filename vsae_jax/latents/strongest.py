"""The firings of each latent with the largest keys, in bounded memory.

A firing is a token on which a latent is not 0. With |f| as the key, these are the top
activations; with a random key, they are a uniform sample without replacement. What is
kept does not depend on how the firings are divided into batches.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

Ids = Int[np.ndarray, " n"]
Keys = Float[np.ndarray, " n"]
Around = Callable[[np.ndarray, np.ndarray], np.ndarray]


class Kept:
    """The `size` firings of each latent with the largest keys; of equal keys the
    earlier token is kept.

    key: `[d_sae, size]`, -inf in an empty slot. token: `[d_sae, size]`, -1 there.
    window: `[d_sae, size, width]`, the latent at the tokens around. Slots are not in
    order before `sort`.
    """

    def __init__(self, d_sae: int, size: int, width: int):
        self.key = np.full((d_sae, size), -np.inf)
        self.token = np.full((d_sae, size), -1, np.int64)
        self.window = np.full((d_sae, size, width), np.nan, np.float32)
        self._least = np.full(d_sae, -np.inf)

    def passing(self, latent: Ids, key: Keys) -> Int[np.ndarray, " passing"]:
        """The firings that would be kept; none may be earlier than those kept now."""
        return np.flatnonzero(key > self._least[latent])

    def add(self, latent: Ids, key: Keys, token: Ids, around: Around) -> None:
        """Adds firings; `around(latent, token)` returns the windows `[m, width]` of
        those that get a slot."""
        if not len(latent):
            return
        size = self.key.shape[1]
        order = np.lexsort((token, -key, latent))
        latent, key, token = latent[order], key[order], token[order]
        rank = _rank_in_runs(latent)
        few = rank < size
        latent, key, token, rank = latent[few], key[few], token[few], rank[few]
        changed, row = np.unique(latent, return_inverse=True)
        shape = len(changed), size + int(rank.max()) + 1
        keys, tokens = np.full(shape, -np.inf), np.full(shape, -1, np.int64)
        keys[:, :size], tokens[:, :size] = self.key[changed], self.token[changed]
        keys[row, size + rank], tokens[row, size + rank] = key, token
        stays = _largest(keys, tokens, size)
        # In each row, as many candidates come in as slots become free.
        row, slot = np.nonzero(~stays[:, :size])
        _, new = np.nonzero(stays[:, size:])
        coming = keys[row, size + new] > -np.inf
        row, slot, new = row[coming], slot[coming], new[coming] + size
        into = changed[row], slot
        self.key[into], self.token[into] = keys[row, new], tokens[row, new]
        self.window[into] = around(changed[row], tokens[row, new])
        self._least[changed] = self.key[changed].min(1)

    def sort(self) -> None:
        """Sorts every latent's firings, the largest key first."""
        order = np.lexsort((self.token, -self.key), axis=1)
        self.key = np.take_along_axis(self.key, order, 1)
        self.token = np.take_along_axis(self.token, order, 1)
        for latent, slots in enumerate(order):  # one at a time: no second copy
            self.window[latent] = self.window[latent, slots]


def best_of_context(
    latent: Ids, key: Keys, token: Ids, context: Ids
) -> Int[np.ndarray, " m"]:
    """The firing with the largest key of each latent in each context; of equal keys the
    earliest."""
    order = np.lexsort((token, -key, context, latent))
    first = np.ones(len(order), bool)
    first[1:] = (np.diff(latent[order]) != 0) | (np.diff(context[order]) != 0)
    return order[first]


def uniform(token: Ids, latent: Ids | int, *, seed: int) -> Keys:
    """A random-looking number in [0, 1): the splitmix64 hash (Steele et al. 2014) of
    seed, token and latent."""
    with np.errstate(over="ignore"):
        x = _mix(token.astype(np.uint64) + _mix(np.uint64(seed)))
        x = _mix(x ^ (np.asarray(latent).astype(np.uint64) << np.uint64(40)))
    return (x >> np.uint64(11)) * 2.0**-53


def _mix(x: Any) -> Any:
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _rank_in_runs(values: Ids) -> Ids:
    """0, 1, 2, ... within each run of equal values."""
    starts = np.flatnonzero(np.diff(values, prepend=values[0] - 1))
    lengths = np.diff(starts, append=len(values))
    return np.arange(len(values)) - np.repeat(starts, lengths)


def _largest(
    keys: Float[np.ndarray, "rows n"], tokens: Int[np.ndarray, "rows n"], size: int
) -> Bool[np.ndarray, "rows n"]:
    """The mask of each row's `size` largest keys; of equal ones the earlier tokens."""
    least = np.partition(keys, keys.shape[1] - size, axis=1)[:, -size, None]
    mask = keys >= least
    # Only rows where several keys equal the last one kept; sorting all would be slow.
    tied = np.flatnonzero(mask.sum(1) > size)
    if len(tied):
        order = np.lexsort((tokens[tied], -keys[tied]), axis=1)
        mask[tied] = False
        mask[tied[:, None], order[:, :size]] = True
    return mask
