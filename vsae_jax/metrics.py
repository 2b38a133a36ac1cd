"""Sums over tokens that every reconstruction metric is made of, and the metrics.

Sums are float32 within a batch, float64 across batches, and carry a mask, so that a
result does not depend on the batch size. Where SAEBench 0.6 computes something else
under the same name, ours says so and theirs has `_saebench` at its end.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

# Edges of the histogram of log10 firing rates; latents that never fire are apart.
DENSITY_EDGES = np.arange(-6.0, 0.01, 0.25)


class BatchSums(NamedTuple):
    """Sums over a batch's kept tokens; x, x_hat `[tokens, d_model]`, f `[tokens, d_sae]`.

    fired: how often each latent was above 0. legacy: of 1 - ||x - x_hat||^2 /
    ||x - mean of the batch||^2.
    """

    tokens: Float[Array, ""]
    error: Float[Array, ""]
    squared_norm: Float[Array, ""]
    x: Float[Array, " d_model"]
    cosine: Float[Array, ""]
    norm_in: Float[Array, ""]
    norm_out: Float[Array, ""]
    norm_ratio: Float[Array, ""]
    l0: Float[Array, ""]
    l1: Float[Array, ""]
    legacy: Float[Array, ""]
    fired: Float[Array, " d_sae"]


@jax.jit
def batch_sums(
    x: Float[Array, "tokens d_model"],
    x_hat: Float[Array, "tokens d_model"],
    f: Float[Array, "tokens d_sae"],
    keep: Bool[Array, " tokens"],
) -> BatchSums:
    """The sums over the tokens where `keep` holds."""
    w = keep.astype(jnp.float32)
    n = jnp.sum(w)
    error = jnp.sum(jnp.square(x - x_hat), axis=-1)
    norm_in = jnp.linalg.norm(x, axis=-1)
    norm_out = jnp.linalg.norm(x_hat, axis=-1)
    dot = jnp.sum(x * x_hat, axis=-1)
    center = w @ x / jnp.maximum(n, 1.0)
    spread = jnp.sum(jnp.square(x - center[None, :]), axis=-1)
    return BatchSums(
        tokens=n,
        error=w @ error,
        squared_norm=w @ jnp.square(norm_in),
        x=w @ x,
        cosine=w @ (dot / jnp.maximum(norm_in * norm_out, 1e-12)),
        norm_in=w @ norm_in,
        norm_out=w @ norm_out,
        norm_ratio=w @ (norm_out / jnp.where(norm_in < 1e-4, 1.0, norm_in)),
        l0=w @ jnp.sum(f != 0, axis=-1, dtype=jnp.float32),
        l1=w @ jnp.sum(jnp.abs(f), axis=-1),
        legacy=w @ (1 - error / jnp.maximum(spread, 1e-12)),
        fired=w @ (f > 0).astype(jnp.float32),
    )


class Reconstruction:
    """Adds up batches and gives the metrics of all tokens seen."""

    def __init__(self) -> None:
        self._sums: dict[str, Any] = {}
        self._batch_means: list[tuple[float, float]] = []

    def add(self, sums: BatchSums) -> None:
        """Adds one batch; a batch without kept tokens changes nothing."""
        host = {n: np.asarray(v, np.float64) for n, v in sums._asdict().items()}
        n = float(host["tokens"])
        if n == 0:
            return
        means = float(host["error"]) / n, float(host["squared_norm"]) / n
        self._batch_means.append(means)
        self._sums = {k: self._sums.get(k, 0.0) + v for k, v in host.items()}

    @property
    def density(self) -> Float[np.ndarray, " d_sae"]:
        """The share of tokens on which each latent is above 0."""
        return self._sums["fired"] / self._sums["tokens"]

    def metrics(self) -> dict[str, float]:
        """Every number of SAEBENCH.md 1.4 that is a mean over tokens."""
        s, n = self._sums, float(self._sums["tokens"])
        variance = float(s["squared_norm"] - np.sum(np.square(s["x"])) / n)
        d_model = len(s["x"])
        return {
            "explained_variance": 1 - float(s["error"]) / max(variance, 1e-30),
            "explained_variance_saebench": self._saebench(d_model),
            "explained_variance_legacy": float(s["legacy"]) / n,
            "mse": float(s["error"]) / n / d_model,
            "cossim": float(s["cosine"]) / n,
            "l2_norm_in": float(s["norm_in"]) / n,
            "l2_norm_out": float(s["norm_out"]) / n,
            "l2_ratio": float(s["norm_ratio"]) / n,
            "l0": float(s["l0"]) / n,
            "l1": float(s["l1"]) / n,
        } | density_metrics(self.density)

    def _saebench(self, d_model: int) -> float:
        """1 - R / (S - (S / d)^2), R and S means over batches: the mean is not removed."""
        r, s = np.mean(self._batch_means, axis=0)
        return float(1 - r / (s - (s / d_model) ** 2))


def density_metrics(density: Float[np.ndarray, " d_sae"]) -> dict[str, float]:
    """Shares of latents by firing rate, and exp(H) of the share of firings each takes."""
    shares = density / max(float(density.sum()), 1e-30)
    positive = shares[shares > 0]
    entropy = -float(np.sum(positive * np.log(positive)))
    return {
        "frac_alive": float(np.mean(density > 0)),
        "frac_alive_above_1e-4": float(np.mean(density > 1e-4)),
        "frac_alive_above_1e-2": float(np.mean(density > 1e-2)),
        "n_alive": float(np.sum(density > 0)),
        "entropy_effective_latents": float(np.exp(entropy)) if len(positive) else 0.0,
    }


def density_histogram(density: Float[np.ndarray, " d_sae"]) -> dict[str, Any]:
    """Latents per bin of log10 firing rate; `never` did not fire at all."""
    alive = np.maximum(np.log10(density[density > 0]), DENSITY_EDGES[0])
    counts, _ = np.histogram(np.minimum(alive, 0.0), DENSITY_EDGES)
    return {
        "log10_edges": DENSITY_EDGES.tolist(),
        "counts": counts.tolist(),
        "never": int(np.sum(density == 0)),
    }
