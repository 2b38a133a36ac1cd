"""Language models as the rest of the library sees them: one class, two backends.

`jax_backend.py` runs the families of `families.py` in JAX; `hf.py` runs any causal
language model through transformers and torch. Neither they nor transformers are
imported before a model is asked for.
"""

from typing import Literal

from vsae_jax.lm.files import ModelFiles, find, locate
from vsae_jax.lm.language_model import LanguageModel
from vsae_jax.lm.passes import (
    Cut,
    Logits,
    Losses,
    Residual,
    Splice,
    Tokens,
    Traceable,
    check_layer,
    identity,
)
from vsae_jax.lm.tokenizer import encode, load_tokenizer
from vsae_jax.system.errors import UserError

__all__ = [
    "Cut",
    "LanguageModel",
    "Logits",
    "Losses",
    "Residual",
    "Splice",
    "Tokens",
    "Traceable",
    "check_layer",
    "encode",
    "identity",
    "leave_room",
    "load_language_model",
    "load_tokenizer",
]


Backend = Literal["transformers", "jax", "auto"]
Dtype = Literal["auto", "float32", "bfloat16"]


def load_language_model(
    model: str | ModelFiles,
    *,
    revision: str | None = None,
    backend: Backend = "auto",
    dtype: Dtype = "auto",
    device: str = "auto",
) -> LanguageModel:
    """The language model in a local folder or under a hub id.

    Args:
      model: local folder with config.json, tokenizer.json and model.safetensors, or a
        hub id; or the files of either, located before.
      revision: branch, tag or commit of a hub id; unset is its default branch.
      backend: `auto` is jax for the families that it runs and that have safetensors,
        and transformers for every other.
      dtype: of the operands of products, see `choose_dtype`.
      device: torch's, with the transformers backend: cpu, cuda, cuda:1 or mps; `auto`
        is the first GPU, or the CPU. JAX has devices of its own (JAX_PLATFORMS).
    """
    if backend not in ("transformers", "jax", "auto"):
        raise UserError(f"backend={backend!r} must be transformers, jax or auto")
    if dtype not in ("auto", "float32", "bfloat16"):
        raise UserError(f"lm_dtype={dtype!r} must be auto, float32 or bfloat16")
    files = locate(model, revision=revision) if isinstance(model, str) else model
    if backend == "jax" or backend == "auto" and _runs_in_jax(files):
        if device != "auto":
            raise UserError(
                f"--device={device} is torch's; add --backend=transformers, or choose "
                "JAX's devices by JAX_PLATFORMS and CUDA_VISIBLE_DEVICES"
            )
        from vsae_jax.lm.jax_backend import load_decoder

        return load_decoder(files, dtype=dtype)
    from vsae_jax.lm.hf import load_hf

    return load_hf(files, dtype=dtype, device=device)


def leave_room(*, backend: Backend, device: str) -> None:
    """For a command that starts JAX before it loads its language model: keeps JAX from
    taking the GPU that torch will use, where the backend is transformers for sure."""
    if backend == "transformers":
        from vsae_jax.lm.torch_device import placed

        placed(device)


def _runs_in_jax(files: ModelFiles) -> bool:
    """Whether the family runs in JAX and its weights are not pickled."""
    from vsae_jax.lm.families import family_of

    if family_of(files.config) is None:
        return False
    safe = "model.safetensors", "model.safetensors.index.json"
    pickled = "pytorch_model.bin", "pytorch_model.bin.index.json"
    return any(find(files, f) for f in safe) or not any(find(files, f) for f in pickled)
