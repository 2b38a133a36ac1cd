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
    """The values that are of their types; the layer and its hook from one another; the
    hub id of a language model that TransformerLens has a short name for.

    `layer` is set only for a hook that is known here.
    """
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
    """A hub id as it is; of a local model's folder the hub id that its config.json says
    it is from, of any other local path only the last part."""
    if not name or not (name.startswith(("/", ".", "~")) or Path(name).is_dir()):
        return name
    path = Path(name).expanduser() / "config.json"
    origin = read_json(path).get("_name_or_path") if path.is_file() else None
    return origin if _is_hub_id(origin) else Path(name).name


def _is_hub_id(name: Any) -> bool:
    return isinstance(name, str) and bool(_HUB_ID.fullmatch(name))


def model_name(ae: Autoencoder) -> str | None:
    """The language model's public name."""
    return public(ae.data.get("model"))
