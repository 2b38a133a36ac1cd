"""The half of `parity.py` that runs in the peers' environment, without vsae_jax.

For every `<case>.npz`: the loss that each library's own trainer computes of those
weights and that batch, and its gradients, by our names and in our orientation, in
`<case>-<library>.npz`.
"""

import sys
from importlib import metadata
from pathlib import Path

import numpy as np
import torch

# As in parity.py, of which this file cannot import anything.
NUMBERS = {"l1": 0.3, "auxk": 1 / 32, "l0": 0.5, "bandwidth": 0.2, "target_l0": 20.0}
K, GROUPS = 8, (16, 64)
WEIGHTS = {"w_enc": "W_enc", "b_enc": "b_enc", "w_dec": "W_dec", "b_dec": "b_dec"}
GATED = WEIGHTS | {"b_enc": "b_gate", "r_mag": "r_mag", "b_mag": "b_mag"}
LINEAR = {"w_enc": "encoder.weight", "b_enc": "encoder.bias"}
LINEAR |= {"w_dec": "decoder.weight", "b_dec": "b_dec"}


def saelens(case: str, arrays: dict[str, torch.Tensor]):
    """A TrainingSAE's loss and its parameters by our names."""
    from sae_lens.saes import (
        batchtopk_sae,
        gated_sae,
        jumprelu_sae,
        matryoshka_batchtopk_sae,
        standard_sae,
        topk_sae,
    )
    from sae_lens.saes.sae import TrainStepInput

    d, m = arrays["w_enc"].shape
    sizes = {"d_in": d, "d_sae": m}
    top = {"k": K, "aux_loss_coefficient": NUMBERS["auxk"]}
    top |= {"rescale_acts_by_decoder_norm": False}
    jump = {"jumprelu_bandwidth": NUMBERS["bandwidth"], "apply_b_dec_to_input": False}
    nested = top | {"matryoshka_widths": [*GROUPS, m]}
    made = {
        "relu": (standard_sae, "Standard", {}, WEIGHTS),
        "topk": (topk_sae, "TopK", top, WEIGHTS),
        "batch_topk": (batchtopk_sae, "BatchTopK", top, WEIGHTS),
        "matryoshka": (
            matryoshka_batchtopk_sae,
            "MatryoshkaBatchTopK",
            nested,
            WEIGHTS,
        ),
        "jump_relu": (jumprelu_sae, "JumpReLU", jump, WEIGHTS | {"theta": "threshold"}),
        "gated": (gated_sae, "Gated", {}, GATED),
    }
    module, name, settings, names = made[case]
    config = getattr(module, f"{name}TrainingSAEConfig")(**sizes, **settings)
    sae = getattr(module, f"{name}TrainingSAE")(config)
    set_to(sae, names, arrays)
    step = TrainStepInput(
        sae_in=arrays["x"],
        coefficients={"l1": NUMBERS["l1"], "l0": NUMBERS["l0"]},
        dead_neuron_mask=arrays["dead"],
        n_training_steps=0,
        is_logging_step=False,
    )
    return sae.training_forward_pass(step).loss, sae, names


def dictionary_learning(case: str, arrays: dict[str, torch.Tensor]):
    """A trainer's loss and its dictionary's parameters by our names."""
    from dictionary_learning.trainers import (
        batch_top_k,
        gdm,
        jumprelu,
        matryoshka_batch_top_k,
        standard,
        top_k,
    )

    d, m = arrays["w_enc"].shape
    run = {"steps": 10, "activation_dim": d, "dict_size": m, "layer": 0}
    run |= {"lm_name": "none", "device": "cpu"}
    once = {"warmup_steps": 1, "sparsity_warmup_steps": None}
    top = {"k": K, "auxk_alpha": NUMBERS["auxk"], "warmup_steps": 1}
    jump = {"bandwidth": NUMBERS["bandwidth"], "sparsity_penalty": NUMBERS["l0"]}
    jump |= {"target_l0": NUMBERS["target_l0"]}
    sizes = np.diff([0, *GROUPS, m]) / m
    nested = top | {"group_fractions": list(sizes)}
    gated = {"b_enc": "gate_bias", "b_dec": "decoder_bias"}
    gated |= {"r_mag": "r_mag", "b_mag": "mag_bias"}
    made = {
        "relu": (standard, "Standard", once, LINEAR | {"b_dec": "bias"}),
        "topk": (top_k, "TopK", top, LINEAR),
        "batch_topk": (batch_top_k, "BatchTopK", top, LINEAR),
        "matryoshka": (matryoshka_batch_top_k, "MatryoshkaBatchTopK", nested, WEIGHTS),
        "jump_relu": (jumprelu, "JumpRelu", once | jump, WEIGHTS | JUMP),
        "gated": (gdm, "GatedSAE", once, LINEAR | gated),
    }
    module, name, settings, names = made[case]
    penalty = {"l1_penalty": NUMBERS["l1"]} if case in ("relu", "gated") else {}
    trainer = getattr(module, f"{name}Trainer")(**run, **settings, **penalty)
    set_to(trainer.ae, names, arrays)
    if case in ("topk", "batch_topk", "matryoshka"):
        silent = arrays["dead"] * trainer.dead_feature_threshold
        trainer.num_tokens_since_fired = silent.long()
    return trainer.loss(arrays["x"], step=5), trainer.ae, names


JUMP = {"theta": "threshold"}


def counting_z(case: str, arrays: dict[str, torch.Tensor]):
    """dictionary_learning's jump_relu with its step on pre-activations in place of f:
    the estimator of the paper."""
    from dictionary_learning.trainers import jumprelu

    assert case == "jump_relu"
    _, ae, names = dictionary_learning(case, arrays)
    x, width = arrays["x"], NUMBERS["bandwidth"]
    z = x @ ae.W_enc + ae.b_enc
    f = jumprelu.JumpReLUFunction.apply(z, ae.threshold, width)
    l0 = jumprelu.StepFunction.apply(z, ae.threshold, width).sum(dim=-1).mean()
    error = (x - ae.decode(f)).pow(2).sum(dim=-1).mean()
    excess = (l0 / NUMBERS["target_l0"] - 1).pow(2)
    return error + NUMBERS["l0"] * excess, ae, names


def set_to(module, names: dict[str, str], arrays: dict[str, torch.Tensor]) -> None:
    """The module's parameters, which are given by our names, set to the arrays."""
    for ours, theirs in names.items():
        array = arrays[ours].T if theirs.endswith(".weight") else arrays[ours]
        module.get_parameter(theirs).data = array.clone().contiguous()


def main(out: Path) -> None:
    """Every case by both libraries."""
    libraries = {"saelens": saelens, "dictionary_learning": dictionary_learning}
    for path in sorted(out.glob("*.npz")):
        arrays = {n: torch.from_numpy(a) for n, a in np.load(path).items()}
        ways = libraries
        if path.stem == "jump_relu":
            ways = libraries | {"dictionary_learning-on_z": counting_z}
        for name, library in ways.items():
            loss, module, names = library(path.stem, arrays)
            module.zero_grad()
            loss.backward()
            found = {"loss": loss.detach().numpy()}
            for ours, theirs in names.items():
                gradient = module.get_parameter(theirs).grad
                turned = theirs.endswith(".weight")
                found[ours] = (gradient.T if turned else gradient).numpy()
            np.savez(out / f"{path.stem}-{name}.npz", **found)
    names = ("torch", "sae-lens", "dictionary-learning", "numpy")
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in names)
    (out / "versions.txt").write_text(versions)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
