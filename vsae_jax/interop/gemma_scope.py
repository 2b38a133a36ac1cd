"""Gemma Scope: one `params.npz` (Gemma 2) or `params.safetensors` (Gemma 3) a folder.

    W_enc [d_model, d_sae], b_enc, W_dec [d_sae, d_model], b_dec, threshold [d_sae]
    z = x @ W_enc + b_enc;  f = relu(z) where z > threshold;  x_hat = f @ W_dec + b_dec

Read only. The files do not say which language model and layer they belong to; their
folder's name does: `gemma-scope-2b-pt-res/layer_20/...`, here, on the hub and in its
cache. Transcoders have the same files and are refused by the names of their folders.
"""

import re
from pathlib import Path
from typing import Any

import numpy as np

from vsae_jax.interop import provenance
from vsae_jax.interop.canonical import Autoencoder, foreign, shown
from vsae_jax.interop.npz import read_npz
from vsae_jax.interop.tensors import (
    our_arrays,
    read_json,
    read_safetensors,
    source_dtype,
)
from vsae_jax.system.errors import UserError

NAME = "gemma_scope"
CONFIG = "config.json"
_READERS = {"params.npz": read_npz, "params.safetensors": read_safetensors}
_NAMES = {"w_enc": "W_enc", "b_enc": "b_enc", "w_dec": "W_dec", "b_dec": "b_dec"}
_NAMES |= {"theta": "threshold"}
# Gemma 2: the site is a part of the repository's name; Gemma 3: of the folder's.
_GEMMA_2 = re.compile(r"gemma-scope-(2|9|27)b-(pt|it)-(res|mlp|att)\b")
_GEMMA_3 = re.compile(r"gemma-scope-2-(270m|\d+b)-(pt|it)/")
_SITES_3 = re.compile(r"/(resid_post|mlp_out|attn_out)(?:_all)?/")
_HOOKS = {"res": "hook_resid_post", "mlp": "hook_mlp_out", "att": "attn.hook_z"}
_HOOKS |= {"resid_post": "hook_resid_post", "mlp_out": "hook_mlp_out"}
_HOOKS |= {"attn_out": "attn.hook_z"}
_LAYER = re.compile(r"/layer_(\d{1,3})[/_]")
_TRANSCODERS = re.compile(r"transcoder|crosscoder|\bclt\b")


def weights(folder: Path) -> Path | None:
    """The file of the weights, if this is such a folder."""
    found = [folder / name for name in _READERS if (folder / name).is_file()]
    return found[0] if len(found) == 1 else None


def read(folder: Path) -> Autoencoder:
    """The autoencoder of a folder of Gemma Scope."""
    path = weights(folder)
    if path is None:
        raise UserError(f"{folder} has none of {', '.join(_READERS)}, or both")
    place = _place(folder)
    _check_is_autoencoder(folder, place)
    # Gemma 3's files write w_enc and w_dec.
    arrays = {
        f"W{name[1:]}" if name.startswith("w_") else name: array
        for name, array in _READERS[path.name](path).items()
    }
    factor = arrays.pop("scaling_factor", np.ones(1))
    if not (factor == 1).all():
        raise UserError(f"{path}: a scaling_factor other than 1 is not read")
    return foreign(
        our_arrays(arrays, _NAMES, where=path),
        rule="jump_relu",
        subtract_b_dec=False,
        data=_data(place),
        source={
            "format": NAME,
            "name": folder.resolve().name,
            "file": path.name,
            "dtype": source_dtype(arrays),
        },
        notes=_notes(place),
    )


def _place(folder: Path) -> str:
    """The folder's name from its repository on, else its last two parts."""
    # The hub's cache calls a repository models--OWNER--NAME.
    path = f"{folder.resolve().as_posix()}/".replace("--", "/")
    at = path.rfind("/gemma-scope")
    return path[at:] if at >= 0 else "/" + "/".join(path.split("/")[-3:])


def _check_is_autoencoder(folder: Path, place: str) -> None:
    """Refuses a transcoder, recognised by the folder's name or by its config."""
    path = folder / CONFIG
    c: dict[str, Any] = read_json(path) if path.is_file() else {}
    if _TRANSCODERS.search(place) or c.get("hf_hook_point_out"):
        raise UserError(
            f"{folder} is a transcoder, from one activation to another; only "
            "autoencoders are read"
        )
    if c.get("architecture", "jump_relu") != "jump_relu":
        raise UserError(
            f"{path}: architecture {shown(c['architecture'])} is not read; expected "
            "jump_relu"
        )


def _data(place: str) -> dict[str, Any]:
    """The language model and the hook, as far as the folder's name tells them."""
    two, three = _GEMMA_2.search(place), _GEMMA_3.search(place)
    site, layer = _SITES_3.search(place), _LAYER.search(place)
    if two:
        chat, hook = "-it" if two[2] == "it" else "", _HOOKS[two[3]]
        model = f"google/gemma-2-{two[1]}b{chat}"
    elif three and site:
        base = "" if three[1] == "270m" and three[2] == "pt" else f"-{three[2]}"
        model, hook = f"google/gemma-3-{three[1]}{base}", _HOOKS[site[1]]
    else:
        return {}
    return provenance.data(
        model=model,
        hook_name=f"blocks.{int(layer[1])}.{hook}" if layer else None,
        context_length=1024,
        bos="keep",
    )


def _notes(place: str) -> tuple[str, ...]:
    if "/embedding/" not in place:
        return ()
    return (
        "it takes rows of the embedding matrix, before Gemma multiplies them by "
        "sqrt(d_model)",
    )
