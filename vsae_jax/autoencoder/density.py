"""How often latents fire: shares by firing rate `[d_sae]`, and a histogram."""

from typing import Any

import numpy as np
from jaxtyping import Float

# Edges of the histogram of log10 firing rates; latents that never fire are not in it.
DENSITY_EDGES = np.arange(-6.0, 0.01, 0.25)


def density_metrics(density: Float[np.ndarray, " d_sae"]) -> dict[str, float]:
    """Shares of latents by firing rate, and exp(H) of their shares of all firings."""
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
