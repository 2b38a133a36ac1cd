"""The variants and the three presets, as tables.

A field's value is looked up in this order, the last that has it wins: the variant's
row, the preset, the preset's own row for that variant, the user's flag.

* `paper`: what the paper's text says (docs/paper_and_code.md 2; what it leaves open is
  in docs/decisions/model-and-training.md).
* `released`: the code that made the paper's numbers (no noise, relu(mu), free norms).
* `baseline`: TopK as dictionary_learning trains it.
"""

from typing import Any, Literal

from vsae_jax.config.fields import as_flag, flag

Preset = Literal["paper", "released", "baseline"]
Variant = Literal[
    "relu",
    "topk",
    "vsae",
    "vsae_topk",
    "batch_topk",
    "vsae_batch_topk",
    "jump_relu",
    "vsae_jump_relu",
    "gated",
    "vsae_gated",
    "matryoshka",
    "vsae_matryoshka",
    "vaease",
]

# What makes a variant: relu and topk are Baker and Li 2.1, vsae and vsae_topk 2.2; the
# sources of the others are named in autoencoder/, in sparsifiers, gate and decoder.
_SIMPLE = {"variance": "fixed", "noise_at": "latents", "gate": "none"}
_SIMPLE |= {"prefixes": "none", "kl_units": "loss"}
_PLAIN = _SIMPLE | {"relu": True, "noise_std": 0.0, "penalty": "none"}
_VARIATIONAL = _SIMPLE | {"relu": False, "noise_std": 1.0, "penalty": "kl"}
_GATED = {"sparsity": "none", "gate": "path"}
_NESTED = {"sparsity": "batch_topk", "prefixes": "1/16:1/8:1/4:1/2"}
_BY_SIGMA = {"gate": "sigma", "variance": "learned", "kl_units": "error"}
VARIANTS: dict[str, dict[str, Any]] = {
    "relu": _PLAIN | {"sparsity": "none", "penalty": "l1"},
    "topk": _PLAIN | {"sparsity": "topk"},
    "vsae": _VARIATIONAL | {"sparsity": "none"},
    "vsae_topk": _VARIATIONAL | {"sparsity": "topk"},
    "batch_topk": _PLAIN | {"sparsity": "batch_topk"},
    "vsae_batch_topk": _VARIATIONAL | {"sparsity": "batch_topk"},
    "jump_relu": _PLAIN | {"sparsity": "jump_relu", "relu": False},
    "vsae_jump_relu": _VARIATIONAL | {"sparsity": "jump_relu"},
    "gated": _PLAIN | _GATED,
    "vsae_gated": _VARIATIONAL | _GATED,
    "matryoshka": _PLAIN | _NESTED,
    "vsae_matryoshka": _VARIATIONAL | _NESTED,
    "vaease": _VARIATIONAL | _BY_SIGMA | {"sparsity": "none"},
}
_AUXK = {"auxk": 1 / 32}

# What an unset flag of `train` becomes, for every variant.
_PAPER: dict[str, Any] = {
    "k": 64,
    "beta": 0.1,
    "d_sae": 2048,
    "steps": 20_000,
    "batch_size": 1024,
    "lr": "auto",
    "selection": "value",
    "kl_over": "all",
    "l1": 0.0,
    "auxk": 0.0,
    "auxk_units": "loss",
    "threshold_decay": 0.99,
    "l0": 0.0,
    "gate_l1": 0.0,
    "gate_error": 1.0,
    "nested": 1.0,
    "target_l0": 0.0,
    "bandwidth": 0.001,
    "threshold_init": 0.001,
    "adam_b1": 0.9,
    "decoder_norm": "unit",
    "decoder_init_norm": 1.0,
    "subtract_b_dec": True,
    "b_dec_init": "geometric_median",
    "input_scale": 100.0,
    "clip_norm": 1.0,
}
_RELEASED = _PAPER | {
    "beta": 1.0,
    "d_sae": 8192,
    "steps": 10_001,
    "batch_size": 192,
    "input_scale": "unit",
}
# docs/paper_and_code.md 3: the released vSAE never samples, and differs from the
# released TopK in learning rate, AuxK, decoder norm, centring and initial norm.
_RELEASED_VSAE = {
    "relu": True,
    "noise_std": 0.0,
    "selection": "magnitude",
    "lr": 8e-4,
    "decoder_norm": "free",
    "decoder_init_norm": 0.1,
    "subtract_b_dec": False,
    "b_dec_init": "zeros",
}
_RELEASED_TOPK = _AUXK | {"dead_after_tokens": 10_000_000, "auxk_units": "variance"}
_BASELINE = _PAPER | {"input_scale": "unit", "auxk_units": "variance"}
_BASELINE_BATCH = {"threshold_decay": 0.999}
# The L1 weight that matters grows with the scale of the input.
_RELU, _RELU_AT_100 = {"l1": 0.05}, {"l1": 5.0}
# Rajamanoharan et al. 2024b at unit scale, with the target of dictionary_learning; at
# 100 the loss has 10,000 times the size and latents 100 times theirs.
_JUMP = {
    "l0": 1.0,
    "target_l0": 20.0,
    "lr": 7e-5,
    "adam_b1": 0.0,
    "subtract_b_dec": False,
    "b_dec_init": "zeros",
}
_JUMP_AT_100 = _JUMP | {"l0": 1e4, "bandwidth": 0.1, "threshold_init": 0.1}

# Rajamanoharan et al. 2024a; the L1 weight, which they vary, is dictionary_learning's.
_GATE = {"gate_l1": 0.1, "lr": 3e-4, "adam_b1": 0.0}
_GATE_AT_100 = _GATE | {"gate_l1": 10.0}
# The evidence's own weight; a coordinate of x and of the prior have the same size.
_VAEASE = {"beta": 1.0, "decoder_norm": "free", "input_scale": "sqrt_d"}

TRAIN_PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "paper": {
        "": _PAPER,
        "topk": _AUXK,
        "batch_topk": _AUXK,
        "matryoshka": _AUXK,
        "relu": _RELU_AT_100,
        "jump_relu": _JUMP_AT_100,
        "vsae_jump_relu": _JUMP_AT_100,
        "gated": _GATE_AT_100,
        "vsae_gated": _GATE_AT_100,
        "vaease": _VAEASE,
    },
    "released": {
        "": _RELEASED,
        "topk": _RELEASED_TOPK,
        "batch_topk": _RELEASED_TOPK,
        "matryoshka": _RELEASED_TOPK,
        "jump_relu": _JUMP,
        "vsae_jump_relu": _JUMP,
        "gated": _GATE,
        "vsae_gated": _GATE,
        "vaease": _VAEASE,
        "relu": _RELU,
        "vsae": _RELEASED_VSAE,
        "vsae_topk": _RELEASED_VSAE,
    },
    "baseline": {
        "": _BASELINE,
        "topk": _AUXK,
        "batch_topk": _AUXK | _BASELINE_BATCH,
        "vsae_batch_topk": _BASELINE_BATCH,
        "matryoshka": _AUXK | _BASELINE_BATCH,
        "vsae_matryoshka": _BASELINE_BATCH,
        "jump_relu": _JUMP,
        "vsae_jump_relu": _JUMP,
        "gated": _GATE,
        "vsae_gated": _GATE,
        "vaease": _VAEASE,
        "relu": _RELU,
    },
}

# The released trainer's warm-up is 2 % of the steps, but at least so many.
LEAST_LR_WARMUP_STEPS = {"paper": 0, "released": 200, "baseline": 0}

# What an unset flag of `extract` becomes. `train` refuses activations that
# contradict REQUIRED_OF_ACTIVATIONS of its preset.
_EXTRACT = {"num_tokens": 22_000_000, "bos": "drop", "center_residual": False}
EXTRACT_PRESETS: dict[str, dict[str, Any]] = {
    "paper": _EXTRACT | {"layer": 0},
    "released": {
        "layer": 3,
        "num_tokens": 2_200_000,
        "bos": "keep",
        "center_residual": True,
    },
    "baseline": _EXTRACT | {"layer": 0},
}
REQUIRED_OF_ACTIVATIONS: dict[str, dict[str, Any]] = {
    "paper": {},
    "released": {"center_residual": True},
    "baseline": {},
}


def training_defaults(preset: str, variant: str) -> dict[str, Any]:
    """Every default of `train` under one preset and variant."""
    tables = TRAIN_PRESETS[preset]
    row = {n: v for n, v in VARIANTS[variant].items() if n != "sparsity"}
    return row | tables[""] | tables.get(variant, {})


def preset_flag(
    help: str,
    *,
    table: str = "train",
    grid: bool | None = None,
    **options: Any,
) -> Any:
    """A field whose default comes from the preset and the variant; None until then, so
    its annotation is the resolved type. `options` are those of `flag`."""
    grid = table == "train" if grid is None else grid
    return flag(help, grid=grid, preset_table=table, **options)


def default_help(name: str, *, table: str) -> str:
    """How `--help` says a default that depends on the preset and the variant."""
    shares = {
        "k_aux": "d_model / 2",
        "dead_after_tokens": "5 % of the run's rows; released topk 10000000",
        "lr_warmup_steps": "2 % of --steps, released at least 200",
        "lr_decay_start": "80 % of --steps",
        "kl_warmup_steps": "10 % of --steps",
    }
    if name in shares:
        return shares[name]
    if table == "extract":
        rows = {p: {"": EXTRACT_PRESETS[p].get(name)} for p in EXTRACT_PRESETS}
    else:
        rows = {
            preset: {v: training_defaults(preset, v).get(name) for v in VARIANTS}
            for preset in TRAIN_PRESETS
        }
    return _grouped(rows)


def _grouped(rows: dict[str, dict[str, Any]]) -> str:
    """`0.1 (vaease 1.0); released 1.0`: what most presets have, then the others; in
    brackets the variants that have another value than most."""
    said = {preset: _of_variants(row) for preset, row in rows.items()}
    texts = list(said.values())
    common = max(texts, key=texts.count)
    others = [f"{preset} {text}" for preset, text in said.items() if text != common]
    return "; ".join([common, *others])


def _of_variants(row: dict[str, Any]) -> str:
    texts = {variant: as_flag(value) for variant, value in row.items()}
    values = list(texts.values())
    common = max(values, key=values.count)
    others = [text for text in dict.fromkeys(values) if text != common]
    parts = [
        f"{', '.join(v for v in texts if texts[v] == text)} {text}" for text in others
    ]
    return f"{common} ({'; '.join(parts)})" if parts else common
