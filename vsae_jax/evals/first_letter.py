"""First-letter spelling: words of a vocabulary, prompts about them, and the residual
stream where a word is read (docs/saebench.md 6.1 and 6.2).

A prompt is ten example lines and a last one without its answer:

    {word} has the first letter: {LETTER}    (ten of these)
    {word} has the first letter:

The residual is read at the word of the last line, found from the tokens after it.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from vsae_jax.activations import text
from vsae_jax.evals import Subject
from vsae_jax.evals.encoding import residuals_at
from vsae_jax.evals.sampling import generator
from vsae_jax.lm import encode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LETTERS = "abcdefghijklmnopqrstuvwxyz"
EXAMPLES = 10
SUFFIX = " has the first letter:"
_TRAIN_SHARE = 0.8


class Words(NamedTuple):
    """Words with their letters' numbers, and the residuals where they are read."""

    words: list[str]
    letters: Int[np.ndarray, " words"]
    x: Float[np.ndarray, "words d_model"]


def alphabetic_words(tokenizer: "PreTrainedTokenizerBase") -> list[str]:
    """The vocabulary's entries of ASCII letters only, with or without a leading space,
    sorted; those that the tokenizer cuts in a prompt are left out."""
    found = set()
    for token in tokenizer.get_vocab():
        word = tokenizer.convert_tokens_to_string([token])
        letters = word.removeprefix(" ")
        if letters.isascii() and letters.isalpha():
            found.add(word)
    words = sorted(found)
    shared = len(encode(["\n" + SUFFIX], tokenizer)[0])
    lengths = (
        len(ids) for ids in encode(["\n" + w + SUFFIX for w in words], tokenizer)
    )
    return [w for w, length in zip(words, lengths, strict=True) if length == shared + 1]


def drawn(words: list[str], most: int | None, seed: int) -> list[str]:
    """At most so many of the words, in their order."""
    if most is None or most >= len(words):
        return words
    chosen = generator(seed, "absorption", "words").permutation(len(words))[:most]
    return [words[i] for i in sorted(chosen)]


def split(words: list[str], rng: np.random.Generator) -> tuple[list[str], list[str]]:
    """Four fifths to train on, and the rest."""
    shuffled = [words[i] for i in rng.permutation(len(words))]
    n = int(len(words) * _TRAIN_SHARE)
    return shuffled[:n], shuffled[n:]


def too_few(words: list[str]) -> bool:
    """Whether there are not enough of them for prompts about the rest of `split`."""
    return len(words) - int(len(words) * _TRAIN_SHARE) <= EXAMPLES


def prompt_length(words: list[str], tokenizer: "PreTrainedTokenizerBase") -> int:
    """Tokens of a prompt: every word is one, and so is a letter."""
    made = prompts(words[:1], words, np.random.default_rng(0))
    return len(encode(made, tokenizer)[0])


def letter_of(word: str) -> int:
    """The number of a word's first letter."""
    return LETTERS.index(word.strip()[0].lower())


def prompts(
    words: Sequence[str], examples: Sequence[str], rng: np.random.Generator
) -> list[str]:
    """One prompt per word, its examples drawn from others."""
    lines = np.array([f"\n{e}{SUFFIX} {e.strip()[0].upper()}" for e in examples])
    made = []
    for word in words:
        chosen = rng.choice(len(examples), EXAMPLES + 1, replace=False)
        chosen = [i for i in chosen if examples[i] != word][:EXAMPLES]
        made.append("".join(lines[chosen]) + f"\n{word}{SUFFIX}")
    return made


def read_words(
    subject: Subject,
    tokenizer: "PreTrainedTokenizerBase",
    words: Sequence[str],
    examples: Sequence[str],
    rng: np.random.Generator,
) -> Words:
    """The residual of each word in a prompt of its own, of which what follows the word
    is not run: nothing there reaches back."""
    suffix = len(encode([SUFFIX], tokenizer)[0])
    ids: list[np.ndarray] = []
    made = prompts(words, examples, rng)
    for start in range(0, len(made), text.DOCUMENTS_AT_ONCE):
        part = encode(made[start : start + text.DOCUMENTS_AT_ONCE], tokenizer)
        ids += [np.array(row, np.int32) for row in part]
    ids = [row[: len(row) - suffix] for row in ids]
    x = residuals_at(subject, ids, np.array([len(row) - 1 for row in ids]))
    return Words(list(words), np.array([letter_of(w) for w in words]), x)
