"""A language model's own tokenizer, and texts as token ids."""

import os
from typing import TYPE_CHECKING, Any

from vsae_jax.lm.files import (
    ModelFiles,
    find,
    locate,
    read_json,
    read_vocab_size,
    tokenizer_source,
)
from vsae_jax.system.errors import UserError, one_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_tokenizer(
    model: str | ModelFiles, *, revision: str | None = None
) -> "PreTrainedTokenizerBase":
    """The model's own tokenizer, checked against the model's vocabulary."""
    files = locate(model, revision=revision) if isinstance(model, str) else model
    source = tokenizer_source(files)
    try:
        tokenizer = _reader(files).from_pretrained(source.path, **source.arguments)
    except Exception as error:  # tokenizers raises nothing narrower
        raise UserError(
            f"the tokenizer of --model={files.name} cannot be read: {one_line(error)}"
        ) from None
    _check_vocabulary(tokenizer, model=files.name, vocab_size=read_vocab_size(files))
    return tokenizer


def _reader(files: ModelFiles) -> Any:
    """The class that reads the tokenizer. AutoTokenizer imports torch, two seconds that
    a GPT-NeoX whose files say that tokenizer.json is all of it need not wait for."""
    import transformers

    path = find(files, "tokenizer_config.json")
    settings = read_json(path) if path else {}
    told = files.config.get("model_type"), settings.get("tokenizer_class")
    if told == ("gpt_neox", "TokenizersBackend") and "auto_map" not in settings:
        return transformers.PreTrainedTokenizerFast
    return transformers.AutoTokenizer


def _check_vocabulary(
    tokenizer: "PreTrainedTokenizerBase", *, model: str, vocab_size: int
) -> None:
    """Refuses a tokenizer with ids that the model does not know.

    Special tokens beyond the vocabulary are accepted: Gemma 3's 1B text model ships
    the image token of its larger sisters, and plain text never produces it.
    """
    special = {i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
    largest = max(set(tokenizer.get_vocab().values()) - special, default=-1)
    if largest >= vocab_size:
        raise UserError(
            f"the tokenizer of --model={model} has ids up to {largest} but the model's "
            f"vocabulary is {vocab_size}: it belongs to another model and would "
            "scramble the text; put the model's own tokenizer files in its place"
        )


def encode(texts: list[str], tokenizer: "PreTrainedTokenizerBase") -> list[list[int]]:
    """The ids of each text. No special tokens are added; one that a text spells stays
    text."""
    # Set, so that the tokenizers library does not warn after a fork.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    # Without the offsets that transformers always asks the tokenizers library for.
    encoder = getattr(tokenizer, "backend_tokenizer", None)
    if encoder is not None:
        encoder.encode_special_tokens = True
        encoder.no_truncation()
        encoder.no_padding()
        encodings = encoder.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]
    return tokenizer(
        texts,
        add_special_tokens=False,
        split_special_tokens=True,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )["input_ids"]
