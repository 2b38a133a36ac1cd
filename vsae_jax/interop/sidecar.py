"""`vsae_jax_export.json`, written beside every export: what its format cannot say.

Where the files came from, the conventions, the selection rule as it was trained, the
run's config and the self-check; and `vsae_extra.safetensors`, the variance head.
"""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from vsae_jax import runs
from vsae_jax.autoencoder import posterior
from vsae_jax.config import SAEConfig
from vsae_jax.config.fields import from_json
from vsae_jax.interop.canonical import (
    RULES,
    THRESHOLDS,
    Autoencoder,
    check_k,
    same_kind,
    shown,
    with_rule,
)
from vsae_jax.interop.tensors import (
    as_float32,
    check_layout,
    listed,
    read_json,
    read_safetensors,
    sha256,
)
from vsae_jax.system.errors import UserError
from vsae_jax.system.files import replace_file

NOTE, EXTRA = "vsae_jax_export.json", "vsae_extra.safetensors"
FORMAT_VERSION = 1
_TYPES = {
    "format_version": int,
    "vsae_jax": str,
    "source": dict,
    "selection": str,
    "k": (int, type(None)),
    "subtract_b_dec": bool,
    "input_norm": str,
    "latent_scale": float,
    "weights_sha256": str,
    "notes": list,
    "carried": list,
    "run": (dict, type(None)),
    "self_check": (dict, type(None)),
}
_OF_WEIGHTS = ("d_model", "d_sae", "subtract_b_dec", "variance")
_INPUT_NORMS = ("none", "layer_norm")


def write(
    ae: Autoencoder,
    folder: Path,
    *,
    weights: Path,
    notes: list[str],
    check: dict[str, Any] | None,
) -> None:
    """Writes the note on `ae`, whose weights are in the file `weights`, and its
    variance head. `notes` are about this format; those of `ae` are carried along."""
    run = {"train": ae.train, "sae": dataclasses.asdict(ae.config), "data": ae.data}
    value = {
        "format_version": FORMAT_VERSION,
        "vsae_jax": runs.versions()["vsae_jax"],
        "source": ae.source,
        "selection": ae.rule,
        "k": ae.config.k if ae.config.has_k else None,
        "subtract_b_dec": ae.config.subtract_b_dec,
        "input_norm": _INPUT_NORMS[ae.layer_norm],
        "latent_scale": ae.latent_scale,
        "weights_sha256": sha256(weights),
        "notes": notes,
        "carried": list(ae.notes),
        "run": run if ae.data else None,
        "self_check": check,
    }
    if "w_var" in ae.params:
        head = {name: ae.params[name] for name in posterior.ARRAYS}
        replace_file(folder / EXTRA, save(head))
    runs.write_json(folder / NOTE, value)


def apply(ae: Autoencoder, folder: Path, *, weights: Path) -> Autoencoder:
    """`ae` as it was before its export, as far as the note beside it tells."""
    path = folder / NOTE
    if not path.is_file():
        return ae
    note = _checked(read_json(path), path)
    if note["weights_sha256"] != sha256(weights):
        raise UserError(
            f"{path} does not belong to {weights.name}: the checksums differ; "
            f"delete {NOTE} to read the weights as they are"
        )
    if (
        note["k"] != ae.k
        and ae.rule not in THRESHOLDS
        or (note["subtract_b_dec"] != ae.config.subtract_b_dec)
    ):
        raise UserError(f"{path} contradicts the files beside it on k or b_dec")
    if not same_kind(note["selection"], ae.rule):
        raise UserError(
            f"{path} contradicts the files beside it on the thresholds or the gate"
        )
    if (folder / EXTRA).is_file():
        ae = dataclasses.replace(ae, params=ae.params | _head(ae, folder / EXTRA))
        config = dataclasses.replace(ae.config, variance="learned")
        ae = dataclasses.replace(ae, config=config)
    ae = with_rule(ae, note["selection"])
    if ae.rule == "batch_topk":
        k = check_k(note["k"], d_sae=ae.config.d_sae, where=path)
        config = dataclasses.replace(ae.config, k=k)
        ae = dataclasses.replace(ae, config=config)
    ae = dataclasses.replace(
        ae,
        source=note["source"],
        notes=tuple(note["carried"]),
        latent_scale=note["latent_scale"],
    )
    return _with_run(ae, note["run"], path) if note["run"] else ae


def layer_norm(folder: Path) -> bool:
    """Whether OpenAI's TopK implies a LayerNorm here; the note can deny it."""
    path = folder / NOTE
    if not path.is_file():
        return True
    return _checked(read_json(path), path)["input_norm"] == "layer_norm"


def _checked(note: dict[str, Any], path: Path) -> dict[str, Any]:
    if note.get("format_version") != FORMAT_VERSION:
        raise UserError(
            f"{path}: format_version is {shown(note.get('format_version'))} and this "
            f"vsae_jax reads {FORMAT_VERSION}"
        )
    wrong = sorted(note.keys() ^ _TYPES.keys())
    wrong += [n for n, kind in _TYPES.items() if not isinstance(note.get(n), kind)]
    if note.get("selection") not in RULES or note.get("input_norm") not in _INPUT_NORMS:
        wrong.append("selection or input_norm")
    if not wrong and not note["latent_scale"] > 0:
        wrong.append("latent_scale")
    lines = () if wrong else (*note["notes"], *note["carried"])
    if wrong or not all(isinstance(line, str) for line in lines):
        raise UserError(
            f"{path} does not match this version at {listed(wrong) or 'notes'}"
        )
    return note


def _head(ae: Autoencoder, path: Path) -> dict[str, np.ndarray]:
    layout = {n: spec.shape(ae.config) for n, spec in posterior.ARRAYS.items()}
    arrays = read_safetensors(path)
    check_layout(arrays, layout, where=path)
    return as_float32(arrays, where=path)


def _with_run(ae: Autoencoder, run: dict[str, Any], path: Path) -> Autoencoder:
    """The autoencoder with the run's own config, which has to fit these weights."""
    data, train = run.get("data"), run.get("train")
    if not isinstance(data, dict) or not isinstance(train, dict | None):
        raise UserError(f"{path}: its run has no data, or train is not an object")
    config = from_json(SAEConfig, run.get("sae", {}), where=str(path))
    told = dataclasses.replace(ae, config=config)
    if (told.rule, told.k) != (ae.rule, ae.k) or any(
        getattr(config, name) != getattr(ae.config, name) for name in _OF_WEIGHTS
    ):
        raise UserError(f"{path}: its run does not fit the files beside it")
    return dataclasses.replace(told, data=data, train=train)
