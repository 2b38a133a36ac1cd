"""Which latents fire together, in bounded memory.

The products f_i f_j of all pairs would need d_sae^2 numbers and k^2 operations per
token. Instead, the firings of a uniform sample of the tokens are kept (all tokens, if
they fit) and multiplied at the end, one latent after another.
"""

from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from vsae_jax.latents.strongest import uniform

# Limits of the sample, as if each of its tokens had the most firings of any: firings
# (128 MB) and products of pairs (seconds); and its tokens.
MAX_FIRINGS, MAX_PRODUCTS, MAX_TOKENS = 2**23, 2**27, 2**21
STRONGEST = 10


class TokenSample:
    """The firings of the tokens whose hash is below a threshold. The threshold starts
    at 1 (all tokens) and is halved whenever a limit is exceeded, so that the sample
    does not depend on the batches."""

    def __init__(self, d_sae: int, *, seed: int):
        self.threshold = 1.0
        self._d_sae, self._seed = d_sae, seed
        self._priority = np.zeros(0)
        self._length = np.zeros(0, np.int64)
        self._latent: list[np.ndarray] = []
        self._value: list[np.ndarray] = []

    def add(self, first: int, counts: Bool[np.ndarray, " rows"], firings: Any) -> None:
        """The next tokens, numbered from `first`."""
        token = first + np.arange(len(counts))
        priority = uniform(token, 0, seed=self._seed + 1)
        chosen = counts & (priority < self.threshold)
        length = np.bincount(firings.row, minlength=len(counts))[chosen]
        mine = chosen[firings.row]
        self._priority = np.concatenate([self._priority, priority[chosen]])
        self._length = np.concatenate([self._length, length])
        self._latent.append(firings.latent[mine].astype(np.int32))
        self._value.append(firings.value[mine])
        while self._too_much():
            self._halve()

    def _too_much(self) -> bool:
        most = int(self._length.max(initial=1))
        return (
            len(self._length) * most > MAX_FIRINGS
            or int(self._length.sum()) * most > MAX_PRODUCTS
            or len(self._length) > MAX_TOKENS
        )

    def _halve(self) -> None:
        self.threshold /= 2
        stays = self._priority < self.threshold
        firings = np.repeat(stays, self._length)
        self._latent = [np.concatenate(self._latent)[firings]]
        self._value = [np.concatenate(self._value)[firings]]
        self._priority, self._length = self._priority[stays], self._length[stays]

    def strongest(self) -> tuple[np.ndarray, np.ndarray, int]:
        """Each latent's largest Pearson correlations with others over the sampled
        tokens, `[d_sae, 10]`; the others' indices (-1: none); the number of tokens."""
        n, count = len(self._length), min(STRONGEST, self._d_sae - 1)
        largest = np.zeros((self._d_sae, STRONGEST), np.float32)
        latents = np.full((self._d_sae, STRONGEST), -1, np.int32)
        latent, value = self._padded()
        total = np.bincount(latent.ravel(), value.ravel(), self._d_sae)
        squares = np.bincount(latent.ravel(), (value**2).ravel(), self._d_sae)
        mean = total / max(n, 1)
        deviation = np.sqrt(np.maximum(squares / max(n, 1) - mean**2, 0))
        for i, (rows, own) in enumerate(_by_latent(latent, value, self._d_sae)):
            if deviation[i] == 0 or not count:
                continue
            products = (value[rows] * own[:, None]).ravel()
            joint = np.bincount(latent[rows].ravel(), products, self._d_sae) / n
            r = _correlation(joint - mean[i] * mean, deviation, i)
            best = np.argpartition(-r, count - 1)[:count]
            best = best[np.argsort(-r[best], kind="stable")]
            best = best[r[best] > 0]
            largest[i, : len(best)], latents[i, : len(best)] = r[best], best
        return largest, latents, n

    def _padded(self) -> tuple[np.ndarray, np.ndarray]:
        """Latents and values, `[tokens, most firings of a token]`, padded with 0."""
        n, most = len(self._length), int(self._length.max(initial=1))
        inside = np.arange(most)[None, :] < self._length[:, None]
        latent, value = np.zeros((n, most), np.int64), np.zeros((n, most))
        if self._latent:
            latent[inside] = np.concatenate(self._latent)
            value[inside] = np.concatenate(self._value)
        return latent, value


def _by_latent(latent: np.ndarray, value: np.ndarray, d_sae: int):
    """The tokens on which each latent fires, and its values there."""
    flat = np.flatnonzero(value)
    order = flat[np.argsort(latent.ravel()[flat], kind="stable")]
    owners = latent.ravel()[order]
    bounds = np.searchsorted(owners, np.arange(d_sae + 1))
    rows, values = order // latent.shape[1], value.ravel()[order]
    for start, stop in zip(bounds[:-1], bounds[1:], strict=True):
        yield rows[start:stop], values[start:stop]


def _correlation(
    covariance: Float[np.ndarray, " d_sae"],
    deviation: Float[np.ndarray, " d_sae"],
    own: int | Int[np.ndarray, ""],
) -> Float[np.ndarray, " d_sae"]:
    """Pearson's r of one latent with all; -inf with itself and with constant ones."""
    scale = deviation[own] * deviation
    r = np.divide(covariance, scale, out=np.full(len(scale), -np.inf), where=scale > 0)
    r[own] = -np.inf
    return r
