"""What is known of an autoencoder's language model, in the words of a run's `data`."""

import re
from pathlib import Path
from typing import Any

from vsae_jax.config import Hook, read_hook
from vsae_jax.interop.canonical import Autoencoder
from vsae_jax.interop.tensors import read_json

_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
# TransformerLens' short names of language models, by how they begin.
_OWNERS = {"pythia-": "EleutherAI", "gemma-": "google"}
_TYPES = {
    "model": str,
    "dataset": str,
    "hook_name": str,
    "layer": int,
    "context_length": int,
    "bos": str,
}


def data(**values: Any) -> dict[str, Any]:
    """A run's `data` from values of another library: those of the right types, the
    layer and its hook from one another, and a language model's hub id for
    TransformerLens' short name of it. `layer` is set only for a hook known here."""
    found = {n: v for n, v in values.items() if type(v) is _TYPES[n] and v != ""}
    for start, owner in _OWNERS.items():
        if str(found.get("model", "")).startswith(start) and "/" not in found["model"]:
            found["model"] = f"{owner}/{found['model']}"
    if hook := read_hook(found.get("hook_name")):
        found["layer"] = hook.layer
    elif "hook_name" not in found and "layer" in found:
        found["hook_name"] = Hook(found["layer"]).name
    return found


def public(name: str | None) -> str | None:
    """A name that may be published: a hub id as it is; for a local model's folder the
    hub id in its config.json; for any other local path only its last part."""
    if not name or not (name.startswith(("/", ".", "~")) or Path(name).is_dir()):
        return name
    path = Path(name).expanduser() / "config.json"
    origin = read_json(path).get("_name_or_path") if path.is_file() else None
    known = isinstance(origin, str) and _HUB_ID.fullmatch(origin)
    return origin if known else Path(name).name


def model_name(ae: Autoencoder) -> str | None:
    """The language model's public name."""
    return public(ae.data.get("model"))
