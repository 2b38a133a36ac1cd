"""The half of `trained.py` that runs in the peers' environment, without vsae_jax.

Every kind and seed by each library's own trainer, on the rows of `train.npy` in their
order; what its own inference makes of `held_out.npy` is `<library>-<kind>-<seed>.json`.
"""

import json
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

AUXK = ("topk", "batch_topk", "matryoshka")


def saelens(kind: str, seed: int, rows: torch.Tensor, s: dict[str, Any], out: Path):
    """`SAETrainer.fit`; returns the autoencoder that it saves for inference."""
    from sae_lens import SAE
    from sae_lens.config import SAETrainerConfig
    from sae_lens.saes import (
        batchtopk_sae,
        gated_sae,
        jumprelu_sae,
        matryoshka_batchtopk_sae,
        standard_sae,
        topk_sae,
    )
    from sae_lens.training.sae_trainer import SAETrainer

    top = {"k": s["k"], "aux_loss_coefficient": s["auxk"]}
    top |= {"rescale_acts_by_decoder_norm": False}
    widths = [int(share * s["d_sae"]) for share in s["prefixes"]]
    jump = {
        "jumprelu_bandwidth": s["bandwidth"],
        "jumprelu_init_threshold": s["threshold_init"],
        "l0_coefficient": s["l0"],
        "l0_warm_up_steps": s["warmup"],
        "decoder_init_norm": 1.0,
    }
    warmed = {"l1_warm_up_steps": s["warmup"]}
    made = {
        "relu": (standard_sae, "Standard", {"l1_coefficient": s["l1"]}),
        "topk": (topk_sae, "TopK", top),
        "batch_topk": (batchtopk_sae, "BatchTopK", top),
        "matryoshka": (
            matryoshka_batchtopk_sae,
            "MatryoshkaBatchTopK",
            top | {"matryoshka_widths": [*widths, s["d_sae"]]},
        ),
        "jump_relu": (jumprelu_sae, "JumpReLU", jump),
        "gated": (
            gated_sae,
            "Gated",
            warmed | {"l1_coefficient": s["gate_l1"]},
        ),
    }
    module, name, settings = made[kind]
    torch.manual_seed(seed)
    config = getattr(module, f"{name}TrainingSAEConfig")(
        d_in=rows.shape[-1], d_sae=s["d_sae"], **settings
    )
    trainer = SAETrainer(
        SAETrainerConfig(
            total_training_samples=s["steps"] * s["batch_size"],
            train_batch_size_samples=s["batch_size"],
            lr=s["lr"],
            lr_end=s["lr"],
            lr_warm_up_steps=s["warmup"],
            lr_decay_steps=s["steps"] - s["decay_start"],
            dead_feature_window=s["steps"] // 20,
        ),
        getattr(module, f"{name}TrainingSAE")(config),
        iter(rows),
    )
    trainer.fit().save_inference_model(out / "saelens")
    return SAE.load_from_disk(out / "saelens")


def dictionary_learning(
    kind: str, seed: int, rows: torch.Tensor, s: dict[str, Any], out: Path
):
    """`update` of a trainer, as its `trainSAE` calls it; returns its dictionary."""
    from dictionary_learning.trainers import (
        batch_top_k,
        gdm,
        jumprelu,
        matryoshka_batch_top_k,
        standard,
        top_k,
    )

    top = {"k": s["k"], "auxk_alpha": s["auxk"], "threshold_start_step": 0}
    edges = [0.0, *s["prefixes"], 1.0]
    nested = top | {"group_fractions": list(np.diff(edges))}
    warmed = {"sparsity_warmup_steps": s["warmup"]}
    jump = warmed | {"bandwidth": s["bandwidth"], "target_l0": float(s["k"])}
    gated = warmed | {"l1_penalty": s["gate_l1"]}
    relu = {"sparsity_warmup_steps": None, "l1_penalty": s["l1"]}
    made = {
        "relu": (standard, "Standard", relu),
        "topk": (top_k, "TopK", top),
        "batch_topk": (batch_top_k, "BatchTopK", top),
        "matryoshka": (matryoshka_batch_top_k, "MatryoshkaBatchTopK", nested),
        "jump_relu": (jumprelu, "JumpRelu", jump),
        "gated": (gdm, "GatedSAE", gated),
    }
    module, name, settings = made[kind]
    torch.manual_seed(seed)
    trainer = getattr(module, f"{name}Trainer")(
        steps=s["steps"],
        activation_dim=rows.shape[-1],
        dict_size=s["d_sae"],
        layer=0,
        lm_name="none",
        device="cpu",
        lr=s["lr"],
        warmup_steps=s["warmup"],
        decay_start=s["decay_start"],
        seed=seed,
        **settings,
    )
    # What its constructor fixes for runs of many millions of rows and for other scales;
    # biases of relu are random there, larger than latents of rows of norm 1.
    if kind in AUXK:
        trainer.dead_feature_threshold = s["steps"] // 20 * s["batch_size"]
    if kind == "relu":
        trainer.ae.encoder.bias.data.zero_()
    if kind == "jump_relu":
        trainer.ae.threshold.data.fill_(s["threshold_init"])
    for step, x in enumerate(rows):
        trainer.update(step, x)
    return trainer.ae


@torch.no_grad()
def measured(autoencoder, x: torch.Tensor) -> dict[str, float]:
    """Explained variance, L0, and the share of latents that fire."""
    f = torch.cat([autoencoder.encode(part) for part in x.split(2000)])
    error = (x - autoencoder.decode(f)).double().pow(2).sum()
    variance = (x - x.mean(dim=0)).double().pow(2).sum()
    on = f != 0
    return {
        "explained_variance": 1 - float(error / variance),
        "l0": int(on.sum()) / len(x),
        "alive": float(on.any(dim=0).float().mean()),
    }


def main(out: Path) -> None:
    """Every kind and seed by both libraries, on one thread: ours runs beside it."""
    torch.set_num_threads(1)
    settings = json.loads((out / "settings.json").read_text())
    rows = torch.from_numpy(np.load(out / "train.npy"))
    rows = rows.reshape(settings["steps"], -1, rows.shape[1])
    held_out = torch.from_numpy(np.load(out / "held_out.npy"))
    kinds = ("relu", *AUXK, "jump_relu", "gated")
    for library in (saelens, dictionary_learning):
        for kind in kinds:
            for seed in settings["seeds"]:
                trained = library(kind, seed, rows, settings, out)
                path = out / f"{library.__name__}-{kind}-{seed}.json"
                path.write_text(json.dumps(measured(trained, held_out)))
    names = ("torch", "sae-lens", "dictionary-learning", "numpy")
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in names)
    (out / "versions.txt").write_text(versions)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
