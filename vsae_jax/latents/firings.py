"""What each latent fires on, from batches of latents in one streaming pass.

A latent fires on a token where f is not 0. Tokens are numbered by the rows of the pass;
a token counts if it is not special. Memory is bounded by d_sae and the limits below,
whatever the number of tokens. The result does not depend on the batches.
"""

import dataclasses
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from vsae_jax.config.features import SAMPLED_FIRINGS
from vsae_jax.latents.correlations import TokenSample
from vsae_jax.latents.strongest import Kept, best_of_context, uniform

# Half the bins of a histogram: those of one sign.
BINS = 64


class Firings(NamedTuple):
    """The firings of a batch, in the order of its rows."""

    row: Int[np.ndarray, " n"]
    latent: Int[np.ndarray, " n"]
    value: Float[np.ndarray, " n"]


@dataclasses.dataclass(frozen=True)
class Limits:
    """How much is kept.

    top: contexts with the strongest activations. sample: firings in the uniform sample.
    reach: tokens on each side in a window. prompts: contexts that are kept whole, with
    the `per_token` strongest latents of each token.
    """

    top: int = 20
    sample: int = SAMPLED_FIRINGS
    reach: int = 12
    prompts: int = 24
    per_token: int = 8
    seed: int = 0


class Histogram:
    """Counts of f per latent in equal bins. Their width is a power of two, doubled when
    a value does not fit, so that the bins do not depend on the order of the values.

    counts: `[d_sae, 2 * BINS]`; bin b of latent i holds the values from
    (b - BINS) * width[i] to below (b - BINS + 1) * width[i], and
    BINS / 2 * width <= max |f| < BINS * width.
    """

    def __init__(self, d_sae: int):
        self.counts = np.zeros((d_sae, 2 * BINS), np.int64)
        self._exponent = np.full(d_sae, -1000)

    @property
    def width(self) -> Float[np.ndarray, " d_sae"]:
        """The width of each latent's bins; 0 for a latent without a value."""
        return np.where(self.counts.any(1), np.ldexp(1.0, self._exponent), 0.0)

    def add(self, firings: Firings, largest: Float[np.ndarray, " d_sae"]) -> None:
        """Counts the values; `largest` is each latent's max |value| among them."""
        # frexp: largest < 2^exponent.
        needed = np.frexp(largest)[1] - BINS.bit_length() + 1
        self._widen(np.flatnonzero((largest > 0) & (needed > self._exponent)), needed)
        scaled = np.ldexp(firings.value.astype(float), -self._exponent[firings.latent])
        index = np.floor(scaled).astype(np.int64) + BINS
        np.add.at(self.counts.reshape(-1), firings.latent * (2 * BINS) + index, 1)

    def _widen(self, latents: Int[np.ndarray, " n"], needed: np.ndarray) -> None:
        shift = np.minimum(needed[latents] - self._exponent[latents], 62)
        target = ((np.arange(2 * BINS) - BINS)[None, :] >> shift[:, None]) + BINS
        wider = np.zeros((len(latents), 2 * BINS), np.int64)
        at = np.arange(len(latents))[:, None]
        np.add.at(wider, (at, target), self.counts[latents])
        self.counts[latents], self._exponent[latents] = wider, needed[latents]


class FeaturePass:
    """Adds up batches of whole contexts; `finish` returns the tables."""

    def __init__(self, d_sae: int, *, limits: Limits):
        self.limits, self.d_sae = limits, d_sae
        width = 2 * limits.reach + 1
        self.n_tokens = self.n_contexts = 0
        self._fired = np.zeros(d_sae, np.int64)
        self._sum = np.zeros(d_sae)
        self._squares = np.zeros(d_sae)
        self._histogram = Histogram(d_sae)
        self._top = Kept(d_sae, limits.top, width)
        self._sample = Kept(d_sae, limits.sample, width)
        self._correlated = TokenSample(d_sae, seed=limits.seed)
        self._prompts: list[tuple[np.ndarray, np.ndarray]] = []

    def add(
        self,
        f: Float[np.ndarray, "contexts rows d_sae"],
        counts: Bool[np.ndarray, "contexts rows"],
    ) -> None:
        """The next contexts; f is 0 at the tokens that do not count."""
        contexts, rows, _ = f.shape
        first = self.n_contexts * rows
        firings = find_firings(f.reshape(-1, self.d_sae))
        self._add_sums(firings)
        self._add_tops(firings, f, counts, first)
        self._add_sample(firings, f, counts, first)
        self._correlated.add(first, counts.reshape(-1), firings)
        for one in f[: max(self.limits.prompts - self.n_contexts, 0)]:
            self._prompts.append(_strongest(one, self.limits.per_token))
        self.n_tokens += int(counts.sum())
        self.n_contexts += contexts

    def _add_sums(self, firings: Firings) -> None:
        latent, value = firings.latent, firings.value.astype(float)
        largest = np.zeros(self.d_sae)
        np.maximum.at(largest, latent, np.abs(value))
        self._fired += np.bincount(latent, minlength=self.d_sae)
        self._sum += np.bincount(latent, value, self.d_sae)
        self._squares += np.bincount(latent, value * value, self.d_sae)
        self._histogram.add(firings, largest)

    def _add_tops(
        self, firings: Firings, f: np.ndarray, counts: np.ndarray, first: int
    ) -> None:
        size = np.abs(firings.value)
        some = self._top.passing(firings.latent, size)
        row, latent, size = firings.row[some], firings.latent[some], size[some]
        best = best_of_context(latent, size, row, row // f.shape[1])
        self._top.add(
            latent[best],
            size[best].astype(float),
            first + row[best],
            _around(f, counts, first, self.limits.reach),
        )

    def _add_sample(
        self, firings: Firings, f: np.ndarray, counts: np.ndarray, first: int
    ) -> None:
        token = first + firings.row
        key = uniform(token, firings.latent, seed=self.limits.seed)
        some = self._sample.passing(firings.latent, key)
        self._sample.add(
            firings.latent[some],
            key[some],
            token[some],
            _around(f, counts, first, self.limits.reach),
        )

    def finish(self, *, groups: int = 10, examples: int = 5) -> dict[str, Any]:
        """The tables, under the names of `features.npz` (see vsae_jax.features)."""
        self._top.sort()
        self._sample.sort()
        reach, n = self.limits.reach, max(self.n_tokens, 1)
        fired = np.maximum(self._fired, 1)
        mean = self._sum / fired
        spread = np.sqrt(np.maximum(self._squares / fired - mean**2, 0))
        correlation, correlated, sampled = self._correlated.strongest()
        prompts = [np.stack(part) for part in zip(*self._prompts)] or [np.zeros(0)] * 2
        return {
            "n_tokens": np.int64(self.n_tokens),
            "n_fired": self._fired,
            "firing_rate": self._fired / n,
            "mean_activation": self._sum / n,
            "mean_when_active": mean,
            "std_when_active": spread,
            "max_activation": np.nan_to_num(self._top.window[:, 0, reach]),
            "histogram": self._histogram.counts,
            "histogram_width": self._histogram.width,
            "top_token": self._top.token,
            "top_values": self._top.window,
            **quantile_groups(self._sample, reach, groups=groups, examples=examples),
            "correlated_latents": correlated,
            "correlation": correlation,
            "correlation_tokens": np.int64(sampled),
            "prompt_latents": prompts[0],
            "prompt_values": prompts[1],
        }


def find_firings(f: Float[np.ndarray, "rows d_sae"]) -> Firings:
    """The places where f is not 0, and its values."""
    # NumPy searches a mask of bytes three times as fast as floats.
    flat = np.flatnonzero(f != 0)
    row, latent = np.divmod(flat, f.shape[1])
    return Firings(row, latent, f.reshape(-1)[flat])


def quantile_groups(
    sample: Kept, reach: int, *, groups: int, examples: int
) -> dict[str, Any]:
    """Groups of equal shares of each latent's sampled firings, the strongest group
    first, with the `examples` firings of each group that have the largest random
    keys."""
    size = np.abs(sample.window[:, :, reach])
    n = np.isfinite(sample.key).sum(1)[:, None]
    order = np.lexsort((sample.token, np.where(size >= 0, -size, np.inf)), axis=1)
    size, token, key = (
        np.take_along_axis(a, order, 1) for a in (size, sample.token, sample.key)
    )
    place = np.arange(size.shape[1])[None, :]
    group = np.where(place < n, place * groups // np.maximum(n, 1), groups)
    by_key = np.lexsort((-key, group), axis=1)
    group = np.take_along_axis(group, by_key, 1)
    # The first `examples` of each group.
    start = np.stack([(group < g).sum(1) for g in range(groups)], 1)
    within = start[:, :, None] + np.arange(examples)[None, None, :]
    stop = np.concatenate([start[:, 1:], n], 1)
    there = within < stop[:, :, None]
    within = np.minimum(within, size.shape[1] - 1)
    chosen = np.take_along_axis(by_key, within.reshape(len(n), -1), 1)
    slots = np.take_along_axis(order, chosen, 1).reshape(within.shape)
    latent = np.arange(len(n))[:, None, None]
    edge = (n - 1).clip(0) * np.arange(groups + 1)[None, :] / groups
    return {
        "quantile_token": np.where(there, sample.token[latent, slots], -1),
        "quantile_values": np.where(
            there[..., None], sample.window[latent, slots], np.float32(np.nan)
        ),
        "quantile_edges": _interpolated(np.nan_to_num(size), edge),
        "quantile_sampled": n[:, 0],
    }


def _interpolated(values: np.ndarray, place: np.ndarray) -> np.ndarray:
    """values[i, place[i, j]], linearly interpolated between whole places."""
    low = np.floor(place).astype(int)
    high = np.minimum(low + 1, values.shape[1] - 1)
    low_value, high_value = (np.take_along_axis(values, i, 1) for i in (low, high))
    return low_value + (place - low) * (high_value - low_value)


def _around(f: np.ndarray, counts: np.ndarray, first: int, reach: int):
    """A function that returns latents at the tokens up to `reach` before and after,
    `[n, width]`; NaN outside the context and at tokens that do not count."""
    rows = f.shape[1]
    flat, counted = f.reshape(-1, f.shape[2]), counts.reshape(-1)
    offsets = np.arange(-reach, reach + 1)[None, :]

    def around(latent: np.ndarray, token: np.ndarray) -> np.ndarray:
        context, place = np.divmod(token - first, rows)
        near = place[:, None] + offsets
        inside = (near >= 0) & (near < rows)
        row = context[:, None] * rows + near.clip(0, rows - 1)
        values = flat[row, latent[:, None]]
        return np.where(inside & counted[row], values, np.float32(np.nan))

    return around


def _strongest(f: Float[np.ndarray, "rows d_sae"], count: int):
    """The latents with the largest |f| of each row, and their values."""
    count = min(count, f.shape[1])
    latent = np.argsort(-np.abs(f), axis=1, kind="stable")[:, :count]
    return latent.astype(np.int32), np.take_along_axis(f, latent, 1)
