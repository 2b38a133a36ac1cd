"""A grid of run folders made by hand, with whatever files a figure is drawn from."""

import json
from itertools import product
from pathlib import Path

import numpy as np
from tiny_runs import D_MODEL, D_SAE, write_run

from vsae_jax.runs.series import Arm, open_arms

VARIANTS, KS, SEEDS = ("topk", "vsae_topk"), (2, 4), (0, 1)
NS = (2, 5, 10, 500)


def make_arms(folder: Path, rows: Path) -> list[Arm]:
    """Two variants, two k, two seeds; every arm has a decoder of its own."""
    named = []
    for number, (variant, k, seed) in enumerate(product(VARIANTS, KS, SEEDS)):
        rng = np.random.default_rng(number)
        w_dec = rng.standard_normal((D_SAE, D_MODEL))
        arrays = {"w_enc": w_dec.T, "w_dec": w_dec}
        name = f"arm-{number}"
        fields = {"variant": variant, "k": k, "seed": seed}
        write_run(folder / name, rows, arrays, **fields)
        named.append({"folder": name, **fields})
    grid = {"swept": ["variant", "k", "seed"], "arms": named}
    (folder / "grid.json").write_text(json.dumps(grid))
    return open_arms(folder)


def write_features(folder: Path, **changed: np.ndarray) -> None:
    """`features/features.npz` and `features.json` as the pass writes them, of a latent
    that fires the more often the higher its number; latent 0 never."""
    rate = np.linspace(0, 0.5, D_SAE)
    ids = np.full((D_SAE, 2, 5), -1)
    ids[:, 0] = [3, 4, 5, 6, 7]
    arrays = {
        "n_tokens": np.int64(1000),
        "firing_rate": rate,
        "mean_activation": rate * 3,
        "mean_when_active": np.full(D_SAE, 3.0),
        "max_activation": np.linspace(0, 40, D_SAE),
        "decoder_norm": np.ones(D_SAE),
        "histogram": np.tile(np.arange(128), (D_SAE, 1)),
        "histogram_width": np.full(D_SAE, 0.5),
        "top_ids": ids,
        "top_values": np.tile(np.array([0, 1, 5, 2, np.nan]), (D_SAE, 2, 1)),
        "top_logit_tokens": np.tile(np.arange(3, 13), (D_SAE, 1)),
        "top_logits": np.tile(np.linspace(9, 1, 10), (D_SAE, 1)),
        "bottom_logit_tokens": np.tile(np.arange(3, 13), (D_SAE, 1)),
        "bottom_logits": np.tile(np.linspace(-9, -1, 10), (D_SAE, 1)),
    }
    out = folder / "features"
    out.mkdir(exist_ok=True)
    np.savez(out / "features.npz", **arrays | changed)
    texts = {str(i): f" w{i}" for i in range(13)} | {
        "3": "$x^2$",
        "4": "\n\x07",
        "5": "漢",
    }
    (out / "features.json").write_text(json.dumps({"tokens": texts}))
