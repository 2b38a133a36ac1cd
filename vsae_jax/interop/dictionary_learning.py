"""dictionary_learning: `ae.pt`, a dict of tensors, and `config.json`.

    AutoEncoder       relu(W (x - bias) + b);  f @ decoder + bias
    AutoEncoderTopK   the k largest of relu(W (x - b_dec) + b)
    BatchTopKSAE      the same, where it is above threshold []
    MatryoshkaBatchTopKSAE   the same with W_enc and W_dec; group_sizes [groups]
    JumpReluAutoEncoder   relu(x W_enc + b_enc) above threshold [d_sae]; f W_dec + b_dec
    GatedAutoEncoder  relu(exp(r_mag) W (x - decoder_bias) + mag_bias), where
                      W (x - decoder_bias) + gate_bias is above 0
    VSAETopK          the paper's authors' fork: relu(mu), then the k largest; a bias
                      is subtracted from x, a decoder.bias (April mode) is not

with encoder.weight [d_sae, d_in] and decoder.weight [d_in, d_sae], W_enc and W_dec as
here. VSAETopK is read, and written as AutoEncoderTopK, which the package itself knows.
The input's scale is folded into the biases: the decoder keeps its norms and latents get
the units of x.
"""

import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vsae_jax import runs
from vsae_jax.config import read_hook
from vsae_jax.interop import provenance
from vsae_jax.interop.canonical import (
    Autoencoder,
    check_k,
    folded,
    foreign,
    not_subtracting,
    refuse_gate_by_sigma,
    refuse_layer_norm,
    shown,
    subtracting,
)
from vsae_jax.interop.pt import read_pt
from vsae_jax.interop.pt_write import write_pt
from vsae_jax.interop.tensors import (
    file_beside,
    our_arrays,
    read_json,
    source_dtype,
    their_arrays,
)
from vsae_jax.system.errors import UserError

NAME = "dictionary_learning"
# The rule that its files say, where it is not the autoencoder's own.
SAYS = {"topk": "relu_topk", "abstopk": "relu_topk", "none": "relu"}
SAYS |= {"gated_linear": "gated"}
CONFIG, WEIGHTS = "config.json", "ae.pt"
_SUBMODULE = re.compile(r"(mlp_out|attn_out)_layer_?(\d{1,4})")
_LINEAR = {"w_enc": "encoder.weight", "b_enc": "encoder.bias"}
_LINEAR |= {"w_dec": "decoder.weight", "b_dec": "b_dec"}
_PLAIN = {"w_enc": "W_enc", "b_enc": "b_enc", "w_dec": "W_dec", "b_dec": "b_dec"}
_GATE = {"b_enc": "gate_bias", "r_mag": "r_mag", "b_mag": "mag_bias"}
_ONE, _EACH = {"threshold": "threshold"}, {"theta": "threshold"}


class _Class(NamedTuple):
    """One of their classes: its selection rule, its trainer, our names and theirs."""

    rule: str
    trainer: str
    names: dict[str, str]


_CLASSES = {
    "AutoEncoder": _Class("relu", "StandardTrainer", _LINEAR | {"b_dec": "bias"}),
    "AutoEncoderTopK": _Class("relu_topk", "TopKTrainer", _LINEAR),
    "VSAETopK": _Class("relu_topk", "VSAETopKTrainer", _LINEAR | {"b_dec": "bias"}),
    "BatchTopKSAE": _Class("batch_topk", "BatchTopKTrainer", _LINEAR | _ONE),
    "MatryoshkaBatchTopKSAE": _Class(
        "batch_topk", "MatryoshkaBatchTopKTrainer", _PLAIN | _ONE
    ),
    "JumpReluAutoEncoder": _Class("jump_relu", "JumpReluTrainer", _PLAIN | _EACH),
    "GatedAutoEncoder": _Class(
        "gated", "GatedSAETrainer", _LINEAR | _GATE | {"b_dec": "decoder_bias"}
    ),
}
_HEAD = {"w_var": "var_encoder.weight", "b_var": "var_encoder.bias"}


weights = file_beside(CONFIG, WEIGHTS)


def read(folder: Path) -> Autoencoder:
    """The autoencoder of a folder that dictionary_learning's `trainSAE` wrote."""
    where, path = folder / CONFIG, folder / WEIGHTS
    config = read_json(where)
    trainer = config.get("trainer")
    if not isinstance(trainer, dict):
        raise UserError(f"{where} has no trainer; expected dictionary_learning's")
    kind = trainer.get("dict_class")
    if kind not in _CLASSES:
        raise UserError(
            f"{where}: dict_class {shown(kind)} is not read; expected "
            f"{', '.join(_CLASSES)}"
        )
    arrays = read_arrays(path)
    rule, names = _CLASSES[kind].rule, dict(_CLASSES[kind].names)
    has_k = rule in ("relu_topk", "batch_topk")
    k = _pop_k(arrays, trainer, path, where) if has_k else None
    threshold = arrays.pop("threshold", None) if kind == "AutoEncoderTopK" else None
    if kind == "VSAETopK" and "decoder.bias" in arrays:  # April mode
        names["b_dec"] = "decoder.bias"
    if kind == "VSAETopK" and _HEAD["b_var"] in arrays:
        names |= _HEAD
    groups = arrays.pop("group_sizes", None)
    params = our_arrays(arrays, names, where=path)
    if "threshold" in params:  # theirs is -1 until it is set
        params["threshold"] = np.maximum(params["threshold"], np.float32(0))
    d, m = params["w_enc"].shape
    if (trainer.get("activation_dim", d), trainer.get("dict_size", m)) != (d, m):
        raise UserError(
            f"{where} says activation_dim={shown(trainer.get('activation_dim'))}, "
            f"dict_size={shown(trainer.get('dict_size'))}, but {WEIGHTS} has {d}, {m}"
        )
    nested = kind == "MatryoshkaBatchTopKSAE"
    return foreign(
        params,
        rule=rule,
        k=check_k(k, d_sae=m, where=where) if has_k else None,
        subtract_b_dec=names["b_dec"] != "decoder.bias" and rule != "jump_relu",
        prefixes=_prefixes(groups, d_sae=m, where=path) if nested else "none",
        data=_data(trainer, config.get("buffer")),
        source={
            "format": NAME,
            "name": folder.name,
            "dict_class": kind,
            "dtype": source_dtype(arrays),
        },
        notes=_notes(kind, threshold),
    )


def _prefixes(groups: np.ndarray | None, *, d_sae: int, where: Path) -> str:
    """The prefixes of a Matryoshka: the running sums of its groups' sizes."""
    if groups is None or groups.ndim != 1 or groups.dtype.kind != "i":
        raise UserError(f"{where}: group_sizes is not a list of whole numbers")
    sizes = [int(size) for size in groups[:1000]]
    if sum(sizes) != d_sae or min(sizes) < 1:
        raise UserError(f"{where}: group_sizes do not add up to the {d_sae} latents")
    return ":".join(map(str, np.cumsum(sizes)[:-1])) or "none"


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a .pt file that holds nothing but a dict of them."""
    value = read_pt(path)
    if not isinstance(value, dict) or not all(
        isinstance(n, str) and isinstance(a, np.ndarray) for n, a in value.items()
    ):
        raise UserError(f"{path} is not a dict of tensors")
    return value


def _pop_k(arrays: dict, trainer: dict[str, Any], path: Path, where: Path) -> Any:
    """k, which is in the config and, as a scalar, among the tensors."""
    stored, k = arrays.pop("k", None), trainer.get("k")
    if stored is None:
        return k
    if stored.shape != () or stored.dtype.kind != "i":
        raise UserError(f"{path}: k is not a whole number but {list(stored.shape)}")
    if k is not None and int(stored) != k:
        raise UserError(f"{where} says k={shown(k)} but {path.name} has k={stored}")
    return int(stored)


def _data(trainer: dict[str, Any], buffer: Any) -> dict[str, Any]:
    buffer = buffer if isinstance(buffer, dict) else {}
    layer = trainer.get("layer")
    hook = trainer.get("submodule_name")
    if isinstance(hook, str) and (match := _SUBMODULE.fullmatch(hook)):
        hook, layer = f"blocks.{match[2]}.hook_{match[1]}", None
    inside = isinstance(hook, str) and "resid" not in hook
    return provenance.data(
        model=trainer.get("lm_name"),
        layer=layer if type(layer) is int and layer >= 0 and not inside else None,
        hook_name=hook if inside else None,
        context_length=buffer.get("ctx_len"),
    )


def _notes(kind: str, threshold: np.ndarray | None) -> tuple[str, ...]:
    if threshold is not None and threshold.size == 1 and threshold >= 0:
        return (
            f"threshold={float(threshold)!r} was not carried over: it is only used "
            "with use_threshold=True, in place of TopK",
        )
    if kind == "VSAETopK":
        return (
            "VSAETopK stores neither its norm_factor nor whether rows were centred",
        )
    return ()


def _submodule(data: dict[str, Any]) -> str | None:
    """Their name of a site inside a block; the stream's needs only the layer."""
    hook = read_hook(data.get("hook_name"))
    if hook is None or hook.site == "resid_post":
        return None
    return f"{hook.site}_layer_{hook.layer}"


def rewritten(ae: Autoencoder) -> Autoencoder:
    """What `write` writes: b_dec subtracted (not of a jump_relu), latents in the units
    of x."""
    refuse_layer_norm(ae, NAME)
    refuse_gate_by_sigma(ae, NAME)
    if ae.rule == "jump_relu":
        return folded(not_subtracting(ae), units="raw")
    return folded(subtracting(ae), units="raw")


def write(ae: Autoencoder, folder: Path) -> Path:
    """The two files of a rewritten autoencoder; returns that of the weights."""
    write_pt(folder / WEIGHTS, _arrays(ae))
    runs.write_json(folder / CONFIG, _config(ae))
    return folder / WEIGHTS


def _arrays(ae: Autoencoder) -> dict[str, Any]:
    kind = _class(ae)
    arrays: dict[str, Any] = their_arrays(ae.params, _CLASSES[kind].names)
    if ae.config.has_k:
        arrays["k"] = np.array(ae.config.k, np.int32)
    if kind == "AutoEncoderTopK":
        arrays["threshold"] = np.array(-1, np.float32)
    if kind == "MatryoshkaBatchTopKSAE":
        widths = [0, *ae.config.widths, ae.config.d_sae]
        arrays["group_sizes"] = np.diff(widths).astype(np.int64)
    return arrays


def _class(ae: Autoencoder) -> str:
    """Their class with the autoencoder's selection rule."""
    if ae.rule == "batch_topk":
        return "MatryoshkaBatchTopKSAE" if ae.config.widths else "BatchTopKSAE"
    says = SAYS.get(ae.rule, ae.rule)
    return next(name for name, kind in _CLASSES.items() if kind.rule == says)


def _config(ae: Autoencoder) -> dict[str, Any]:
    train, data, c = ae.train or {}, ae.data, ae.config
    kind = _class(ae)
    trainer = {"trainer_class": _CLASSES[kind].trainer, "dict_class": kind} | {
        "lr": train.get("lr"),
        "steps": train.get("steps"),
        "auxk_alpha": train.get("auxk"),
        "warmup_steps": train.get("lr_warmup_steps"),
        "decay_start": train.get("lr_decay_start"),
        "threshold_beta": None,
        "threshold_start_step": None,
        "seed": train.get("seed"),
        "activation_dim": c.d_model,
        "dict_size": c.d_sae,
        "device": "cpu",
        "layer": data.get("layer"),
        "lm_name": provenance.model_name(ae) or "unknown",
        "wandb_name": ae.source.get("name"),
        "submodule_name": _submodule(data),
    }
    trainer |= {"k": c.k} if c.has_k else {}
    if kind == "MatryoshkaBatchTopKSAE":
        trainer["group_sizes"] = [int(n) for n in np.diff([0, *c.widths, c.d_sae])]
    buffer = {"d_submodule": c.d_model, "ctx_len": data.get("context_length")}
    return {"trainer": trainer, "buffer": buffer}
