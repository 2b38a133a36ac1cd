"""What is known of an autoencoder's language model, in the words of a run's `data`."""

import re
from pathlib import Path
from typing import Any

from vsae_jax.config import hook_name as hook_of_layer
from vsae_jax.interop.canonical import Autoencoder

_HOOK = re.compile(r"blocks\.(\d{1,4})\.hook_resid_post")
_TYPES = {
    "model": str,
    "dataset": str,
    "hook_name": str,
    "layer": int,
    "context_length": int,
    "bos": str,
}


def data(**values: Any) -> dict[str, Any]:
    """The values that are of their types; the layer and its hook from one another.

    `layer` is set only for the residual stream after a block.
    """
    found = {n: v for n, v in values.items() if type(v) is _TYPES[n] and v != ""}
    if match := _HOOK.fullmatch(found.get("hook_name", "")):
        found["layer"] = int(match[1])
    elif "hook_name" not in found and "layer" in found:
        found["hook_name"] = hook_of_layer(found["layer"])
    return found


def public(name: str | None) -> str | None:
    """A hub id as it is; of a local path only the last part."""
    return Path(name).name if name and name.startswith(("/", ".", "~")) else name


def model_name(ae: Autoencoder) -> str | None:
    """The language model's public name."""
    return public(ae.data.get("model"))
