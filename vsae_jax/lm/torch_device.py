"""Which device torch runs a language model on, and how JAX leaves it room there."""

import importlib.util
import os
from collections.abc import MutableMapping
from typing import Any

from vsae_jax.system.errors import UserError, missing_extra

_KINDS = ("cpu", "cuda", "mps")
_PREALLOCATE = "XLA_PYTHON_CLIENT_PREALLOCATE"
# Where one of them is set, the user has chosen.
_SETTINGS = (_PREALLOCATE, "XLA_PYTHON_CLIENT_MEM_FRACTION", "XLA_CLIENT_MEM_FRACTION")
_GPU_PLATFORMS = ("cuda", "gpu", "rocm")
_GPU_PLUGINS = ("jax_cuda13_plugin", "jax_cuda12_plugin", "jax_rocm7_plugin")


def placed(device: str) -> str:
    """`device` resolved, once JAX is told to leave torch room on it."""
    if importlib.util.find_spec("torch") is None:
        hint = missing_extra("torch", extra="torch")
        raise UserError(
            f"{hint} (--backend=jax needs none, for the families that it runs)"
        )
    import torch

    device = resolve(device, torch)
    if note := leave_room(device):
        print(note)
    return device


def resolve(device: str, torch: Any) -> str:
    """`device` as torch names it; `auto` is the first GPU, or the CPU. Refuses a device
    that is not there."""
    n_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "auto":
        return "cuda:0" if n_gpus else "cpu"
    kind, colon, number = device.partition(":")
    if kind not in _KINDS or colon and not (kind == "cuda" and number.isdecimal()):
        raise UserError(f"--device={device} must be auto, cpu, cuda, cuda:N or mps")
    if kind == "mps" and not torch.backends.mps.is_available():
        raise UserError("--device=mps, but torch finds none here; say --device=cpu")
    if kind == "cuda" and int(number or 0) >= n_gpus:
        raise UserError(
            f"--device={device}, but torch finds {n_gpus} GPUs; say --device=cpu"
        )
    return f"cuda:{number or 0}" if kind == "cuda" else device


def leave_room(device: str, environ: MutableMapping[str, str] = os.environ) -> str:
    """Keeps JAX, if it has not started yet, from taking three quarters of a GPU that
    torch also uses, unless the user has chosen otherwise. Returns a note on it, or "".

    device: torch's, resolved.
    """
    platforms = environ.get("JAX_PLATFORMS", "")
    on_gpu = not platforms or any(name in platforms for name in _GPU_PLATFORMS)
    plugin = any(importlib.util.find_spec(name) for name in _GPU_PLUGINS)
    shared = device.startswith("cuda") and on_gpu and plugin
    if not shared or any(name in environ for name in _SETTINGS):
        return ""
    environ[_PREALLOCATE] = "false"
    return (
        f"note: torch and JAX share {device}: JAX takes memory as it needs it "
        f"({_PREALLOCATE}=false), unless it had started; should torch's run out, set "
        "that in the shell"
    )
