"""dictionary_learning: `ae.pt`, a dict of tensors, and `config.json`.

    AutoEncoder       relu(W (x - bias) + b);  f @ decoder + bias
    AutoEncoderTopK   the k largest of relu(W (x - b_dec) + b)
    BatchTopKSAE      the same, where it is above threshold []
    JumpReluAutoEncoder   relu(x W_enc + b_enc) above threshold [d_sae]; f W_dec + b_dec
    VSAETopK          the paper's authors' fork: relu(mu), then the k largest; a bias
                      is subtracted from x, a decoder.bias (April mode) is not

with encoder.weight [d_sae, d_in] and decoder.weight [d_in, d_sae], W_enc and W_dec as
here. VSAETopK is read and
written as AutoEncoderTopK, which the package itself knows. The input's scale is folded
into the biases: the decoder keeps its norms, latents get the units of x.
"""

from pathlib import Path
from typing import Any

import numpy as np

from vsae_jax import runs
from vsae_jax.interop import provenance
from vsae_jax.interop.canonical import (
    Autoencoder,
    check_k,
    folded,
    foreign,
    not_subtracting,
    refuse_layer_norm,
    shown,
    subtracting,
)
from vsae_jax.interop.pt import read_pt
from vsae_jax.interop.pt_write import write_pt
from vsae_jax.interop.tensors import (
    as_float32,
    check_layout,
    read_json,
    size_of,
    source_dtype,
)
from vsae_jax.system.errors import UserError

NAME = "dictionary_learning"
# The rule that its files say, where it is not the autoencoder's own.
SAYS = {"topk": "relu_topk", "abstopk": "relu_topk", "none": "relu"}
CONFIG, WEIGHTS = "config.json", "ae.pt"
_CLASSES = {
    "AutoEncoder": "relu",
    "AutoEncoderTopK": "relu_topk",
    "VSAETopK": "relu_topk",
    "BatchTopKSAE": "batch_topk",
    "JumpReluAutoEncoder": "jump_relu",
}
_JUMP_NAMES = {"w_enc": "W_enc", "b_enc": "b_enc", "w_dec": "W_dec", "b_dec": "b_dec"}
_JUMP_NAMES |= {"theta": "threshold"}


def weights(folder: Path) -> Path | None:
    """The file of the weights, if this is such a folder."""
    both = (folder / CONFIG).is_file() and (folder / WEIGHTS).is_file()
    return folder / WEIGHTS if both else None


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
    rule = _CLASSES[kind]
    has_k = rule not in ("relu", "jump_relu")
    k = _pop_k(arrays, trainer, path, where) if has_k else None
    threshold = arrays.pop("threshold", None) if kind == "AutoEncoderTopK" else None
    bias = _bias(kind, arrays)
    jump = rule == "jump_relu"
    m = size_of(arrays, "b_enc" if jump else "encoder.bias", where=path)
    d = size_of(arrays, bias, where=path)
    if (trainer.get("activation_dim", d), trainer.get("dict_size", m)) != (d, m):
        raise UserError(
            f"{where} says activation_dim={shown(trainer.get('activation_dim'))}, "
            f"dict_size={shown(trainer.get('dict_size'))}, but {WEIGHTS} has {d}, {m}"
        )
    has_head = "var_encoder.bias" in arrays and kind == "VSAETopK"
    layout = _layout(d, m, rule, has_head=has_head) | {bias: (d,)}
    check_layout(arrays, layout, where=path)
    return foreign(
        _params(as_float32(arrays, where=path), bias, rule),
        rule=rule,
        k=check_k(k, d_sae=m, where=where) if has_k else None,
        subtract_b_dec=bias != "decoder.bias" and not jump,
        data=_data(trainer, config.get("buffer")),
        source={
            "format": NAME,
            "name": folder.name,
            "dict_class": kind,
            "dtype": source_dtype(arrays),
        },
        notes=_notes(kind, threshold),
    )


def _layout(d: int, m: int, rule: str, *, has_head: bool) -> dict[str, tuple[int, ...]]:
    if rule == "jump_relu":
        biases = {"b_enc": (m,), "threshold": (m,)}
        return {"W_enc": (d, m), "W_dec": (m, d)} | biases
    weights = {"encoder.weight": (m, d), "encoder.bias": (m,), "decoder.weight": (d, m)}
    head = {"var_encoder.weight": (m, d), "var_encoder.bias": (m,)}
    threshold = {"threshold": ()} if rule == "batch_topk" else {}
    return weights | threshold | (head if has_head else {})


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """A .pt file that holds nothing but a dict of tensors."""
    value = read_pt(path)
    if not isinstance(value, dict) or not all(
        isinstance(n, str) and isinstance(a, np.ndarray) for n, a in value.items()
    ):
        raise UserError(f"{path} is no dict of tensors")
    return value


def _pop_k(arrays: dict, trainer: dict[str, Any], path: Path, where: Path) -> Any:
    """k, which stands in the config and, as a scalar, among the tensors."""
    stored, k = arrays.pop("k", None), trainer.get("k")
    if stored is None:
        return k
    if stored.shape != () or stored.dtype.kind != "i":
        raise UserError(f"{path}: k is no whole number but {list(stored.shape)}")
    if k is not None and int(stored) != k:
        raise UserError(f"{where} says k={shown(k)} but {path.name} has k={stored}")
    return int(stored)


def _bias(kind: str, arrays: dict[str, np.ndarray]) -> str:
    if kind in ("AutoEncoderTopK", "BatchTopKSAE", "JumpReluAutoEncoder"):
        return "b_dec"
    april = kind == "VSAETopK" and "decoder.bias" in arrays
    return "decoder.bias" if april else "bias"


def _params(
    floats: dict[str, np.ndarray], bias: str, rule: str
) -> dict[str, np.ndarray]:
    if rule == "jump_relu":
        return {ours: floats[theirs] for ours, theirs in _JUMP_NAMES.items()}
    params = {
        "w_enc": floats["encoder.weight"].T.copy(),
        "b_enc": floats["encoder.bias"],
        "w_dec": floats["decoder.weight"].T.copy(),
        "b_dec": floats[bias],
    }
    if "var_encoder.weight" in floats:
        params["w_var"] = floats["var_encoder.weight"].T.copy()
        params["b_var"] = floats["var_encoder.bias"]
    if rule == "batch_topk":  # theirs is -1 until it is set
        params["threshold"] = np.maximum(floats["threshold"], np.float32(0))
    return params


def _data(trainer: dict[str, Any], buffer: Any) -> dict[str, Any]:
    buffer = buffer if isinstance(buffer, dict) else {}
    layer = trainer.get("layer")
    hook = trainer.get("submodule_name")
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


def rewritten(ae: Autoencoder) -> Autoencoder:
    """What `write` writes: b_dec subtracted (not of a jump_relu), latents in the units
    of x."""
    refuse_layer_norm(ae, NAME)
    if ae.rule == "jump_relu":
        return folded(not_subtracting(ae), units="raw")
    return folded(subtracting(ae), units="raw")


def write(ae: Autoencoder, folder: Path) -> Path:
    """The two files of a rewritten autoencoder; returns that of the weights."""
    write_pt(folder / WEIGHTS, _arrays(ae))
    runs.write_json(folder / CONFIG, _config(ae))
    return folder / WEIGHTS


def _arrays(ae: Autoencoder) -> dict[str, Any]:
    p = ae.params
    if ae.rule == "jump_relu":
        return {theirs: p[ours] for ours, theirs in _JUMP_NAMES.items()}
    arrays: dict[str, Any] = {
        "encoder.weight": np.ascontiguousarray(p["w_enc"].T),
        "encoder.bias": p["b_enc"],
        "decoder.weight": np.ascontiguousarray(p["w_dec"].T),
    }
    if not ae.config.has_k:
        return arrays | {"bias": p["b_dec"]}
    return arrays | {
        "b_dec": p["b_dec"],
        "k": np.array(ae.config.k, np.int32),
        "threshold": p.get("threshold", np.array(-1, np.float32)),
    }


def _config(ae: Autoencoder) -> dict[str, Any]:
    train, data, c = ae.train or {}, ae.data, ae.config
    kind = {"relu": "Standard AutoEncoder", "none": "Standard AutoEncoder"}
    kind |= {"batch_topk": "BatchTopK BatchTopKSAE"}
    kind |= {"jump_relu": "JumpRelu JumpReluAutoEncoder"}
    name, dict_class = kind.get(ae.rule, "TopK AutoEncoderTopK").split()
    trainer = {"trainer_class": f"{name}Trainer", "dict_class": dict_class} | {
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
        "submodule_name": None,
    }
    trainer |= {"k": c.k} if c.has_k else {}
    buffer = {"d_submodule": c.d_model, "ctx_len": data.get("context_length")}
    return {"trainer": trainer, "buffer": buffer}
