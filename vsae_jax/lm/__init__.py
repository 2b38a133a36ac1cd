"""Language models as the rest of the library sees them: one protocol, two backends.

`jax_backend.py` runs the families of `families.py` in JAX; `hf.py` runs any causal
language model through transformers and torch. Neither they nor transformers are
imported before a model is asked for.
"""

from typing import TYPE_CHECKING, Literal

from vsae_jax.lm.dtype import choose_dtype
from vsae_jax.lm.files import (
    ModelFiles,
    find,
    locate,
    read_vocab_size,
    tokenizer_source,
)
from vsae_jax.lm.protocol import (
    Cut,
    LanguageModel,
    Logits,
    Losses,
    Residual,
    Splice,
    Tokens,
    Traceable,
    check_layer,
    identity,
    next_token_loss,
)
from vsae_jax.system.errors import UserError, one_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

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
    "identity",
    "load_language_model",
    "load_tokenizer",
    "next_token_loss",
]


Backend = Literal["transformers", "jax", "auto"]
Dtype = Literal["auto", "float32", "bfloat16"]


def load_language_model(
    model: str | ModelFiles,
    *,
    revision: str | None = None,
    backend: Backend = "auto",
    dtype: Dtype = "auto",
) -> LanguageModel:
    """The language model in a local folder or under a hub id.

    Args:
      model: local folder with config.json, tokenizer.json and model.safetensors, or a
        hub id; or the files of either, located before.
      revision: branch, tag or commit of a hub id; unset is its default branch.
      backend: `auto` is jax for the families that it runs and that have safetensors,
        and transformers for every other.
      dtype: of the operands of products, see `choose_dtype`.
    """
    if backend not in ("transformers", "jax", "auto"):
        raise UserError(f"backend={backend!r} must be transformers, jax or auto")
    if dtype not in ("auto", "float32", "bfloat16"):
        raise UserError(f"lm_dtype={dtype!r} must be auto, float32 or bfloat16")
    files = _located(model, revision)
    chosen = choose_dtype(files) if dtype == "auto" else dtype
    if backend == "jax" or backend == "auto" and _runs_in_jax(files):
        from vsae_jax.lm.jax_backend import load_decoder

        return load_decoder(files, dtype=chosen)
    from vsae_jax.lm.hf import load_hf

    return load_hf(files, dtype=chosen)


def _runs_in_jax(files: ModelFiles) -> bool:
    """Whether the family runs in JAX and its weights are not pickled."""
    from vsae_jax.lm.families import family_of

    if family_of(files.config) is None:
        return False
    safe = "model.safetensors", "model.safetensors.index.json"
    pickled = "pytorch_model.bin", "pytorch_model.bin.index.json"
    return any(find(files, f) for f in safe) or not any(find(files, f) for f in pickled)


def _located(model: str | ModelFiles, revision: str | None) -> ModelFiles:
    return locate(model, revision=revision) if isinstance(model, str) else model


def load_tokenizer(
    model: str | ModelFiles, *, revision: str | None = None
) -> "PreTrainedTokenizerBase":
    """The model's own tokenizer, checked against the model's vocabulary."""
    files = _located(model, revision)
    source = tokenizer_source(files)
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(source.path, **source.arguments)
    except Exception as error:  # tokenizers raises nothing narrower
        raise UserError(
            f"the tokenizer of --model={files.name} cannot be read: {one_line(error)}"
        ) from None
    _check_vocabulary(tokenizer, model=files.name, vocab_size=read_vocab_size(files))
    return tokenizer


def _check_vocabulary(
    tokenizer: "PreTrainedTokenizerBase", *, model: str, vocab_size: int
) -> None:
    """Refuses a tokenizer with ids that the model does not know.

    Special tokens beyond the vocabulary are let pass: Gemma 3's 1B text model ships
    the image token of its larger sisters, and plain text does not produce them.
    """
    special = {i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
    largest = max(set(tokenizer.get_vocab().values()) - special, default=-1)
    if largest >= vocab_size:
        raise UserError(
            f"the tokenizer of --model={model} has ids up to {largest} but the model's "
            f"vocabulary is {vocab_size}: it belongs to another model and would "
            "scramble the text; put the model's own tokenizer files in its place"
        )
