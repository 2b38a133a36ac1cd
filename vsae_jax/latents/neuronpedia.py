"""Features under the field names of SAEDashboard, which Neuronpedia reads.

Each batch of features has a file, as its `NeuronpediaDashboardBatch` writes it:
`batch-0.json` holds {"model_id", "layer", "sae_set", "features": [...]}. Tables about
neurons are empty, since they are not computed here.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from vsae_jax.system.files import replace_file

_FEATURES_IN_FILE = 64
_UNKNOWN_TABLES = (
    "neuron_alignment_indices",
    "neuron_alignment_values",
    "neuron_alignment_l1",
    "correlated_neurons_indices",
    "correlated_neurons_l1",
    "correlated_neurons_pearson",
    "decoder_weights_dist",
)


def write(folder: Path, arrays: dict[str, Any], info: dict[str, Any]) -> None:
    """Every latent that fires, in files of 64."""
    folder.mkdir(exist_ok=True)
    for stale in folder.glob("batch-*.json"):
        stale.unlink()
    alive = np.flatnonzero(arrays["n_fired"])
    for number, start in enumerate(range(0, len(alive), _FEATURES_IN_FILE)):
        batch = {
            "model_id": info["model_name"],
            "layer": info["layer"],
            "sae_set": info["hook_name"],
            "features": [
                feature(int(latent), arrays, info)
                for latent in alive[start : start + _FEATURES_IN_FILE]
            ],
        }
        data = json.dumps(batch, allow_nan=False).encode()
        replace_file(folder / f"batch-{number}.json", data)


def feature(latent: int, arrays: dict[str, Any], info: dict[str, Any]) -> dict:
    """One latent as their `NeuronpediaDashboardFeature`."""
    texts = info["tokens"]
    bars, heights = _density(arrays, latent)
    low, high = (float(edge) for edge in arrays["logit_range"][latent])
    counts = arrays["logit_histogram"][latent]
    edges = np.linspace(low, high, len(counts) + 1)
    known = arrays["correlated_latents"][latent] >= 0
    return {
        "feature_index": latent,
        **{name: [] for name in _UNKNOWN_TABLES},
        "correlated_features_indices": arrays["correlated_latents"][latent][
            known
        ].tolist(),
        "correlated_features_l1": [],
        "correlated_features_pearson": _rounded(arrays["correlation"][latent][known]),
        "neg_str": [texts[str(i)] for i in arrays["bottom_logit_tokens"][latent]],
        "neg_values": _rounded(arrays["bottom_logits"][latent]),
        "pos_str": [texts[str(i)] for i in arrays["top_logit_tokens"][latent]],
        "pos_values": _rounded(arrays["top_logits"][latent]),
        "frac_nonzero": float(arrays["firing_rate"][latent]),
        "freq_hist_data_bar_values": bars,
        "freq_hist_data_bar_heights": heights,
        "logits_hist_data_bar_heights": counts.tolist(),
        "logits_hist_data_bar_values": _rounded((edges[1:] + edges[:-1]) / 2),
        "n_prompts_total": info["contexts"][1] - info["contexts"][0],
        "n_tokens_in_prompt": info["context_length"],
        "dataset": info["dataset"],
        "activations": _activations(latent, arrays, texts),
    }


def _density(arrays: dict[str, Any], latent: int) -> tuple[list[float], list[int]]:
    """The bins' middles and counts, from the first to the last that is not empty."""
    counts, width = arrays["histogram"][latent], arrays["histogram_width"][latent]
    there = np.flatnonzero(counts)
    bins = np.arange(there[0], there[-1] + 1)
    return _rounded((bins - len(counts) // 2 + 0.5) * width), counts[bins].tolist()


def _activations(latent: int, arrays: dict[str, Any], texts: dict[str, str]) -> list:
    """The strongest sequences (with -1 for bin_min and bin_contains), then examples
    from each share of the firings."""
    edges = arrays["quantile_edges"][latent]
    groups, examples = arrays["quantile_context"].shape[1:]
    top = abs(float(arrays["max_activation"][latent]))
    found = [
        _sequence(arrays, "top", (latent, i), texts, (-1.0, top, -1.0))
        for i in range(arrays["top_context"].shape[1])
    ]
    for g in range(groups):
        about = float(edges[g + 1]), float(edges[g]), 1 / groups
        found += [
            _sequence(arrays, "quantile", (latent, g, i), texts, about)
            for i in range(examples)
        ]
    return [one for one in found if one is not None]


def _sequence(
    arrays: dict[str, Any],
    kind: str,
    at: tuple[int, ...],
    texts: dict[str, str],
    about: tuple[float, float, float],
) -> dict[str, Any] | None:
    if arrays[f"{kind}_context"][at] < 0:
        return None
    ids, values = arrays[f"{kind}_ids"][at], arrays[f"{kind}_values"][at]
    inside = ids >= 0
    return {
        "bin_min": about[0],
        "bin_max": about[1],
        "bin_contains": about[2],
        "tokens": [texts[str(i)] for i in ids[inside]],
        "values": _rounded(np.nan_to_num(values[inside])),
    }


def _rounded(values: np.ndarray) -> list[float]:
    """Five digits are enough to look at."""
    return [float(f"{value:.5g}") for value in values]
