"""The half of `trained.py` that runs in the peers' environment, without vsae_jax.

Every kind and seed by each library's own trainer, on the rows of `train.npy` in their
order; what its own inference makes of `held_out.npy` is one JSON file. `changed` names
what is taken out of a trainer, so that it does as ours; "" is the trainer as it is.
"""

import json
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.utils import parametrize

AUXK = ("topk", "batch_topk", "matryoshka")


class Exp(torch.nn.Module):
    """Of an array that is trained as its logarithm."""

    def forward(self, log: torch.Tensor) -> torch.Tensor:
        return log.exp()

    def right_inverse(self, x: torch.Tensor) -> torch.Tensor:
        return x.log()


def saelens(
    kind: str,
    seed: int,
    rows: torch.Tensor,
    s: dict[str, Any],
    out: Path,
    changed: str = "",
):
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

    auxk = 0.0 if changed == "no AuxK" else s["auxk"]
    top = {"k": s["k"], "aux_loss_coefficient": auxk}
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
    sae = getattr(module, f"{name}TrainingSAE")(config)
    if changed in ("unit rows", "unit rows, frozen copy"):
        keep_rows_at_norm_1(sae)
    if changed == "unit rows, frozen copy":
        freeze_decoder_in_gate_error(sae)
    if changed == "log theta":
        parametrize.register_parametrization(sae, "threshold", Exp())
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
        sae,
        iter(rows),
    )
    trainer.fit()
    if changed == "log theta":
        parametrize.remove_parametrizations(sae, "threshold")
    if changed.startswith("unit rows"):
        sae.W_dec.data /= sae.W_dec.data.norm(dim=1, keepdim=True)
    sae.save_inference_model(out / "saelens")
    return SAE.load_from_disk(out / "saelens")


def keep_rows_at_norm_1(sae) -> None:
    """Decoder rows are brought to norm 1 before each step, and lose the part of their
    gradient along themselves."""
    plain = sae.training_forward_pass

    def after_norm(step_input):
        sae.W_dec.data /= sae.W_dec.data.norm(dim=1, keepdim=True)
        return plain(step_input)

    def across(gradient: torch.Tensor) -> torch.Tensor:
        rows = sae.W_dec.detach()
        return gradient - (gradient * rows).sum(dim=1, keepdim=True) * rows

    sae.training_forward_pass = after_norm
    sae.W_dec.register_hook(across)


def freeze_decoder_in_gate_error(sae) -> None:
    """Gated: the error of x from the gate alone does not train the decoder."""

    def losses(step_input, feature_acts, hidden_pre, sae_out):
        x = step_input.sae_in
        g = torch.relu((x - sae.b_dec) @ sae.W_enc + sae.b_gate)
        x_hat = g @ sae.W_dec.detach() + sae.b_dec.detach()
        l1 = step_input.coefficients["l1"] * (g * sae.W_dec.norm(dim=1)).sum(-1).mean()
        return {"l1_loss": l1, "gate_error": (x_hat - x).pow(2).sum(-1).mean()}

    sae.calculate_aux_loss = losses


def dictionary_learning(
    kind: str,
    seed: int,
    rows: torch.Tensor,
    s: dict[str, Any],
    out: Path,
    changed: str = "",
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

    auxk = 0.0 if changed == "no AuxK" else s["auxk"]
    top = {"k": s["k"], "auxk_alpha": auxk, "threshold_start_step": 0}
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
    if changed == "log theta, counting z":
        train_log_theta_counting_z(trainer)
    if changed not in ("", "no AuxK"):
        begin_as_ours(trainer, warmup=s["warmup"])
    for step, x in enumerate(rows):
        trainer.update(step, x)
    return trainer.ae


def begin_as_ours(trainer, *, warmup: int) -> None:
    """The rate rises from one step's worth, not from 0, and the decoder of relu has
    norm 1 before the first step, too."""
    if hasattr(trainer.ae, "decoder"):
        decoder = trainer.ae.decoder.weight.data
        decoder /= decoder.norm(dim=0, keepdim=True)
    (rate,) = trainer.scheduler.lr_lambdas
    trainer.scheduler = torch.optim.lr_scheduler.LambdaLR(
        trainer.optimizer, lambda step: rate(step + 1 if step < warmup else step)
    )


def train_log_theta_counting_z(trainer) -> None:
    """jump_relu with thresholds that are trained as logarithms, and the step of its L0
    on pre-activations in place of f: both as in the paper."""
    from dictionary_learning.trainers import jumprelu

    ae, width = trainer.ae, trainer.bandwidth
    parametrize.register_parametrization(ae, "threshold", Exp())
    kept = {n: trainer.optimizer.defaults[n] for n in ("lr", "betas", "eps")}
    trainer.optimizer = torch.optim.Adam(ae.parameters(), **kept)

    def loss(x, step, **_):
        z = x @ ae.W_enc + ae.b_enc
        f = jumprelu.JumpReLUFunction.apply(z, ae.threshold, width)
        l0 = jumprelu.StepFunction.apply(z, ae.threshold, width).sum(-1).mean()
        weight = trainer.sparsity_coefficient * trainer.sparsity_warmup_fn(step)
        error = (x - ae.decode(f)).pow(2).sum(-1).mean()
        return error + weight * (l0 / trainer.target_l0 - 1).pow(2)

    trainer.loss = loss


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


LIBRARIES = {"saelens": saelens, "dictionary_learning": dictionary_learning}


def main(out: Path) -> None:
    """Every row of the settings and every seed that is missing; on one thread, since
    ours runs beside it."""
    torch.set_num_threads(1)
    settings = json.loads((out / "settings.json").read_text())
    rows = torch.from_numpy(np.load(out / "train.npy"))
    rows = rows.reshape(settings["steps"], -1, rows.shape[1])
    held_out = torch.from_numpy(np.load(out / "held_out.npy"))
    for library, kind, changed in settings["rows"]:
        for seed in settings["seeds"]:
            path = out / f"{library}-{kind}-{changed or 'as it is'}-{seed}.json"
            if not path.is_file():
                given = kind, seed, rows, settings, out, changed
                trained = LIBRARIES[library](*given)
                path.write_text(json.dumps(measured(trained, held_out)))
    names = ("torch", "sae-lens", "dictionary-learning", "numpy")
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in names)
    (out / "versions.txt").write_text(versions)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
