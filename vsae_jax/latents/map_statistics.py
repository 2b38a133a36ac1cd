"""Numbers about how latents lie, by which a picture of them can be judged.

A number that depends on how many points there are comes with its value by chance.
"""

from typing import Any

import numpy as np
from jaxtyping import Float, Int

from vsae_jax.autoencoder.density import density_metrics

# The range of the paper's histograms of maximum activations, and of its counts.
PAPER_RANGE = (0.0, 2.5)
ALIVE_ABOVE = (0.0, 1e-4, 1e-2, 0.1)
COSINE_EDGES = np.linspace(-1.0, 1.0, 201)
_ROWS_AT_ONCE = 256
_SHUFFLES = 200


def unit_rows(rows: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n d"]:
    """Rows at norm 1; a zero row stays."""
    norm = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.maximum(norm, 1e-30)


def cosines(
    rows: Float[np.ndarray, "n d"],
) -> tuple[Float[np.ndarray, " n"], Int[np.ndarray, " bins"]]:
    """Each row's largest cosine to another row, and the histogram of the cosines of all
    pairs over COSINE_EDGES."""
    unit = unit_rows(rows)
    nearest = np.full(len(unit), np.nan)
    counts = np.zeros(len(COSINE_EDGES) - 1, np.int64)
    for start in range(0, len(unit) if len(unit) > 1 else 0, _ROWS_AT_ONCE):
        part = np.clip(unit[start : start + _ROWS_AT_ONCE] @ unit.T, -1.0, 1.0)
        later = np.arange(len(unit))[None, :] > start + np.arange(len(part))[:, None]
        counts += np.histogram(part[later], COSINE_EDGES)[0]
        own = np.arange(len(part))
        part[own, start + own] = -np.inf
        nearest[start : start + len(part)] = part.max(1)
    return nearest, counts


def random_nearest_cosine(n: int, d: int, *, seed: int) -> float:
    """The mean nearest cosine of n directions drawn uniformly in d dimensions."""
    rng = np.random.default_rng(seed)
    return float(cosines(rng.standard_normal((n, d), np.float32))[0].mean())


def alive_counts(
    rate: Float[np.ndarray, " d_sae"], most: Float[np.ndarray, " d_sae"]
) -> dict[str, float]:
    """The numbers of latents above several firing rates; exp(H) of the rates' shares,
    and its share of the latents that fire, which is 1 where all fire equally often.
    `n_max_in_paper_range` counts as the paper did (docs/paper_and_code.md 4): latents
    whose maximum lies in its histogram."""
    effective = density_metrics(rate)["entropy_effective_latents"]
    alive = {f"n_alive_above_{t:g}": float((rate > t).sum()) for t in ALIVE_ABOVE}
    low, high = PAPER_RANGE
    return alive | {
        "n_max_in_paper_range": float(((most > low) & (most <= high)).sum()),
        "entropy_effective_latents": effective,
        "effective_share_of_alive": effective / max(alive["n_alive_above_0"], 1.0),
    }


def cluster_numbers(
    labels: Int[np.ndarray, " n"], rate: Float[np.ndarray, " n"], *, seed: int
) -> dict[str, Any]:
    """Sizes and mean firing rates of clusters, and their coefficients of variation over
    clusters. `cluster_rate_cv_shuffled` is that of the rates where latents are dealt
    out at random to clusters of the same sizes, that is, without any structure."""
    sizes = np.bincount(labels)
    means = _cluster_means(labels, rate)
    rng = np.random.default_rng(seed)
    shuffled = [
        _variation(_cluster_means(labels, rng.permutation(rate)))
        for _ in range(_SHUFFLES)
    ]
    return {
        "cluster_size_min": float(sizes.min()),
        "cluster_size_max": float(sizes.max()),
        "cluster_size_cv": _variation(sizes),
        "cluster_rate_min": float(means.min()),
        "cluster_rate_max": float(means.max()),
        "cluster_rate_cv": _variation(means),
        "cluster_rate_cv_shuffled": float(np.mean(shuffled)),
        "rate_cv": _variation(rate),
    }


def _cluster_means(labels: np.ndarray, values: np.ndarray) -> np.ndarray:
    return np.bincount(labels, weights=values) / np.bincount(labels)


def _variation(values: np.ndarray) -> float:
    """Standard deviation / mean; 0 of zeros."""
    mean = float(np.mean(values))
    return float(np.std(values)) / mean if mean else 0.0
