"""SAELens 6: `cfg.json` and `sae_weights.safetensors` (standard, topk, abstopk,
jumprelu, gated; of training, batchtopk and matryoshka_batchtopk).

    W_enc [d_in, d_sae], b_enc, W_dec [d_sae, d_in], b_dec
    pre = (x - b_dec * apply_b_dec_to_input) @ W_enc + b_enc;  TopK(pre), then relu
    jumprelu: relu(pre) where pre > threshold [d_sae]; a batch_topk is saved as one
    gated: relu(pre) of W_enc exp(r_mag) and b_mag, where that of W_enc and b_gate is
    above 0
    batchtopk, matryoshka_batchtopk: topk_threshold [], which becomes a jumprelu's

The input's scale and mean are folded into the weights; latents keep their values. What
a training checkpoint holds for training alone is ignored.
"""

from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from vsae_jax import runs
from vsae_jax.autoencoder import sae
from vsae_jax.interop import provenance
from vsae_jax.interop.canonical import (
    THRESHOLDS,
    Autoencoder,
    check_k,
    folded,
    foreign,
    refuse_gate_by_sigma,
    shown,
    thresholds,
)
from vsae_jax.interop.saelens_before_6 import as_of_6
from vsae_jax.interop.tensors import (
    check_keys,
    file_beside,
    our_arrays,
    read_json,
    read_safetensors,
    size_of,
    source_dtype,
    their_arrays,
)
from vsae_jax.system.errors import UserError
from vsae_jax.system.files import replace_file

NAME = "saelens"
# The rule that its files say, where it is not the autoencoder's own.
SAYS = {"topk": "relu_topk", "none": "relu", "gated_linear": "gated"}
CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
# The version whose files these are; below 6.0.0 SAELens reads them another way.
_VERSION = "6.54.12"
_ARCHITECTURES = {
    "standard": "relu",
    "topk": "relu_topk",
    "abstopk": "abstopk",
    "jumprelu": "jump_relu",
    "gated": "gated",
    "batchtopk": "batch_topk",
    "matryoshka_batchtopk": "batch_topk",
}
_KEYS = (
    "architecture d_in d_sae k dtype device apply_b_dec_to_input normalize_activations "
    "reshape_activations rescale_acts_by_decoder_norm metadata"
)
# Settings of training, which change no latent of a trained autoencoder.
_OF_TRAINING = (
    " decoder_init_norm aux_loss_coefficient use_sparse_activations topk_threshold_lr "
    "matryoshka_widths use_matryoshka_aux_loss l1_coefficient l1_warm_up_steps lp_norm "
    "jumprelu_init_threshold jumprelu_bandwidth jumprelu_sparsity_loss_mode "
    "l0_coefficient l0_warm_up_steps pre_act_loss_coefficient jumprelu_tanh_scale "
    "jumprelu_ste_to_input target_l0"
)
_WRITTEN = {"relu_topk": "topk", "topk": "topk", "abstopk": "abstopk"}
_WRITTEN |= dict.fromkeys(THRESHOLDS, "jumprelu")
_WRITTEN |= {"gated": "gated", "gated_linear": "gated"}
_NAMES = {"w_enc": "W_enc", "b_enc": "b_enc", "w_dec": "W_dec", "b_dec": "b_dec"}
_GATED = {"b_enc": "b_gate", "r_mag": "r_mag", "b_mag": "b_mag"}
_NAMES_OF = {
    "jump_relu": _NAMES | {"theta": "threshold"},
    "batch_topk": _NAMES | {"threshold": "topk_threshold"},
    "gated": _NAMES | _GATED,
}


weights = file_beside(CONFIG, WEIGHTS)


def read(folder: Path) -> Autoencoder:
    """The autoencoder of a folder that SAELens' `save_model` wrote."""
    where, c = folder / CONFIG, read_json(folder / CONFIG)
    c = c if _is_6(c.get("metadata")) else as_of_6(c, where)
    _check_config(c, where)
    arrays = read_safetensors(folder / WEIGHTS)
    # Before 6 it was also written where it was not used.
    if (arrays.get("scaling_factor", np.zeros(1)) == 1).all():
        del arrays["scaling_factor"]
    rule = _ARCHITECTURES[c["architecture"]]
    names = _NAMES_OF.get(rule, _NAMES)
    d = size_of(arrays, names["b_dec"], where=folder / WEIGHTS)
    m = size_of(arrays, names["b_enc"], where=folder / WEIGHTS)
    if (c.get("d_in"), c.get("d_sae")) != (d, m):
        raise UserError(
            f"{where} says d_in={shown(c.get('d_in'))}, d_sae={shown(c.get('d_sae'))}, "
            f"but {WEIGHTS} has {d} and {m}"
        )
    params = our_arrays(arrays, names, where=folder / WEIGHTS)
    if c.get("rescale_acts_by_decoder_norm"):
        params = _with_unit_rows(params)
    return foreign(
        params,
        rule=rule,
        k=_k(c, rule, d_sae=m, where=where),
        subtract_b_dec=c["apply_b_dec_to_input"],
        prefixes=_prefixes(c, d_sae=m, where=where),
        layer_norm=c["normalize_activations"] == "layer_norm",
        data=_data(c["metadata"]),
        source={"format": NAME, "name": folder.name, "dtype": source_dtype(arrays)},
    )


def _check_config(c: dict[str, Any], where: Path) -> None:
    check_keys(c, _KEYS + _OF_TRAINING, where=where)
    if str(c.get("architecture")) not in _ARCHITECTURES:
        raise UserError(
            f"{where}: architecture {shown(c.get('architecture'))} is not read; "
            f"expected {', '.join(_ARCHITECTURES)}"
        )
    if c.get("normalize_activations") not in ("none", "layer_norm"):
        raise UserError(
            f"{where}: normalize_activations {shown(c.get('normalize_activations'))} "
            "is not read; fold it into the weights first (none), or layer_norm"
        )
    if c.get("reshape_activations", "none") != "none":
        raise UserError(f"{where}: reshape_activations is not read; expected none")
    if type(c.get("apply_b_dec_to_input")) is not bool:
        raise UserError(f"{where}: apply_b_dec_to_input must be true or false")


def _k(c: dict[str, Any], rule: str, *, d_sae: int, where: Path) -> int | None:
    """k of a rule that has one; that of a batchtopk, which is a mean, rounded."""
    k = c.get("k")
    if rule == "batch_topk" and type(k) is float and 0.5 <= k < 2**31:
        k = round(k)
    has_k = rule in ("relu_topk", "abstopk", "batch_topk")
    return check_k(k, d_sae=d_sae, where=where) if has_k else None


def _prefixes(c: dict[str, Any], *, d_sae: int, where: Path) -> str:
    """The widths of a matryoshka_batchtopk, without the last, d_sae."""
    if c["architecture"] != "matryoshka_batchtopk":
        return "none"
    widths = c.get("matryoshka_widths")
    if not isinstance(widths, list) or not all(type(w) is int for w in widths):
        raise UserError(f"{where}: matryoshka_widths is not a list of whole numbers")
    return ":".join(str(w) for w in widths if w != d_sae) or "none"


def _is_6(metadata: Any) -> bool:
    if not isinstance(metadata, dict):
        return False
    major = str(metadata.get("sae_lens_version", "")).partition(".")[0]
    return major.isdecimal() and len(major) < 4 and int(major) >= 6


def _with_unit_rows(params: dict[str, Any]) -> dict[str, Any]:
    """The same with decoder rows of norm 1: TopK of pre * ||W_dec_i||, with
    f / ||W_dec_i|| decoded, is TopK with unit rows."""
    norm = np.linalg.norm(params["w_dec"].astype(np.float64), axis=1)
    if not norm.all():
        raise UserError("a decoder row of norm 0 cannot be rescaled")
    every = sae.every_array()
    # A batchtopk's one threshold is already that of unit rows.
    latents = [n for n in params if every[n].in_latents and every[n].axes]
    new = {n: params[n] * norm for n in latents}
    new |= {"w_enc": params["w_enc"] * norm, "w_dec": params["w_dec"] / norm[:, None]}
    return params | {n: np.ascontiguousarray(a, np.float32) for n, a in new.items()}


def _data(metadata: dict[str, Any]) -> dict[str, Any]:
    """What SAELens knows of the language model, in a run's words."""
    bos = {"True": "keep", "False": "none"}.get(str(metadata.get("prepend_bos")))
    kwargs = metadata.get("model_from_pretrained_kwargs")
    centred = isinstance(kwargs, dict) and kwargs.get("center_writing_weights") is True
    return ({"center_residual": True} if centred else {}) | provenance.data(
        model=metadata.get("model_name"),
        hook_name=metadata.get("hook_name"),
        context_length=metadata.get("context_size"),
        dataset=metadata.get("dataset_path"),
        bos=bos,
    )


def rewritten(ae: Autoencoder) -> Autoencoder:
    """What `write` writes: the same, with scale and mean folded."""
    refuse_gate_by_sigma(ae, NAME)
    return folded(ae, units="scaled")


def write(ae: Autoencoder, folder: Path) -> Path:
    """The two files of a rewritten autoencoder; returns that of the weights."""
    architecture = _WRITTEN.get(ae.rule, "standard")
    names = _NAMES | _GATED if architecture == "gated" else _NAMES
    arrays = their_arrays(ae.params, names)
    if ae.rule in THRESHOLDS:
        arrays["threshold"] = thresholds(ae)
    config = {
        "d_in": ae.config.d_model,
        "d_sae": ae.config.d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": ae.config.subtract_b_dec,
        "normalize_activations": "layer_norm" if ae.layer_norm else "none",
        "reshape_activations": "none",
        "metadata": _metadata(ae),
        "architecture": architecture,
    }
    if ae.k is not None:
        config |= {"k": ae.k, "rescale_acts_by_decoder_norm": False}
    replace_file(folder / WEIGHTS, save(arrays))
    runs.write_json(folder / CONFIG, config)
    return folder / WEIGHTS


def _metadata(ae: Autoencoder) -> dict[str, Any]:
    data = ae.data
    centered = {"center_writing_weights": True} if data.get("center_residual") else {}
    return {
        "sae_lens_version": _VERSION,
        "sae_lens_training_version": None,
        "model_name": provenance.model_name(ae),
        "hook_name": data.get("hook_name"),
        "hook_head_index": None,
        "context_size": data.get("context_length"),
        "dataset_path": provenance.public(data.get("dataset")),
        "prepend_bos": data.get("bos") != "none" if "bos" in data else None,
        "seqpos_slice": [None],
        "model_from_pretrained_kwargs": centered,
        "vsae_jax": {"selection": ae.rule, "source": ae.source.get("name")},
    }
