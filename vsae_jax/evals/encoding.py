"""Texts -> tokens -> language model -> latents, pooled over the tokens of each text.

SAEBench's pooling (docs/saebench.md 2.1): special tokens and padding do not count. A
text's vector is the mean over its other tokens, of x or of each token's latents. One
pass of the language model serves all autoencoders of a grid.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from vsae_jax.activations import text
from vsae_jax.autoencoder import sae
from vsae_jax.autoencoder.reader import Reader, jit_encode
from vsae_jax.evals import Subject
from vsae_jax.lm import encode
from vsae_jax.system import progress
from vsae_jax.system.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CONTEXT = 128
# Texts of similar length share a batch, padded to one of these lengths or the longest.
_LENGTHS = (16, 32, 64)


class Pooled(NamedTuple):
    """The mean of the language model's x over each text's tokens, and the number of
    tokens that count; both are 0 where a text has none."""

    x: Float[np.ndarray, "texts d_model"]
    n_valid: Int[np.ndarray, " texts"]


class Latents(NamedTuple):
    """An autoencoder's pooled latents, with what ablating each of them subtracts.

    at_zero: the latents at x = 0. directions: what a unit of a latent adds to x.
    """

    pooled: Float[np.ndarray, "texts d_sae"]
    at_zero: Float[np.ndarray, " d_sae"]
    directions: Float[np.ndarray, "d_sae d_model"]


def tokenise(
    texts: Sequence[str],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    bos: list[int],
    length: int = CONTEXT,
) -> list[Int[np.ndarray, " tokens"]]:
    """The ids of each text after `bos`, cut at `length`."""
    ids: list[np.ndarray] = []
    for start in range(0, len(texts), text.DOCUMENTS_AT_ONCE):
        part = list(texts[start : start + text.DOCUMENTS_AT_ONCE])
        encoded = encode(part, tokenizer)
        ids += [np.array((bos + row)[:length], np.int32) for row in encoded]
    return ids


def encode_texts(
    subjects: Sequence[Subject],
    tokens: Sequence[Int[np.ndarray, " tokens"]],
    *,
    stored_norms: bool,
) -> tuple[Pooled, list[Latents]]:
    """Pooled vectors of the texts and of each subject's latents on them. The subjects
    share their language model and hook."""
    lm, reader = subjects[0].lm, subjects[0].reader
    x = np.zeros((len(tokens), lm.d_model), np.float32)
    n_valid = np.zeros(len(tokens), np.int32)
    pooled = [np.zeros((len(tokens), s.run.sae.d_sae), np.float32) for s in subjects]
    size = subjects[0].batch_size
    with progress.bar(len(tokens), unit="texts") as bar:
        special = sorted(lm.special_ids)
        for rows, batch in _batches(tokens, size, special):
            residual = jnp.asarray(lm.at(batch.tokens, [reader.place])[0])
            masked, mean = _masked(reader, residual, batch.keep)
            n = len(rows)
            _check_finite(subjects[0], mean[:n])
            x[rows], n_valid[rows] = mean[:n], batch.keep[:n].sum(axis=1)
            for subject, out in zip(subjects, pooled, strict=True):
                out[rows] = np.asarray(_pool(subject.reader, masked, batch.keep))[:n]
            bar.update(n)
    each = zip(subjects, pooled, strict=True)
    return Pooled(x, n_valid), [_latents(s.reader, p, stored_norms) for s, p in each]


def residuals_at(
    subject: Subject,
    tokens: Sequence[Int[np.ndarray, " tokens"]],
    places: Int[np.ndarray, " texts"],
) -> Float[np.ndarray, "texts d_model"]:
    """The row of each text at its place, as the autoencoder reads it."""
    reader = subject.reader
    found = np.zeros((len(tokens), subject.lm.d_model), np.float32)
    with progress.bar(len(tokens), unit="texts") as bar:
        for rows, batch in _batches(tokens, subject.batch_size, []):
            found_there = jnp.asarray(subject.lm.at(batch.tokens, [reader.place])[0])
            own = found_there[np.arange(len(rows)), places[rows]][:, None]
            found[rows] = reader.rows(own)
            _check_finite(subject, found[rows])
            bar.update(len(rows))
    return found


def _check_finite(
    subject: Subject, x: Float[Array | np.ndarray, "rows d_model"]
) -> None:
    """Refuses a language model that gives NaN or infinity, on which probes would still
    get a score."""
    if not np.isfinite(x).all():
        raise UserError(
            f"--model={subject.lm.name} gives NaN or infinity at "
            f"{subject.reader.place.name}: its weights are damaged or too large"
        )


def encode_residuals(
    subject: Subject, x: Float[np.ndarray, "rows d_model"], *, stored_norms: bool
) -> tuple[Float[np.ndarray, "rows d_sae"], Float[np.ndarray, "d_sae d_model"]]:
    """Latents of single rows, and their directions, in the units of `Latents`."""
    size = subject.batch_size * CONTEXT
    padded = np.pad(x, ((0, -len(x) % size), (0, 0))).reshape(-1, size, 1, x.shape[1])
    keep = np.ones((size, 1), bool)
    f = [np.asarray(_pool(subject.reader, part, keep)) for part in padded]
    latents = _latents(subject.reader, np.concatenate(f)[: len(x)], stored_norms)
    return latents.pooled, latents.directions


class _Batch(NamedTuple):
    tokens: Int[np.ndarray, "batch time"]
    keep: Bool[np.ndarray, "batch time"]


def _batches(
    tokens: Sequence[Int[np.ndarray, " tokens"]], size: int, special: list[int]
) -> Iterator[tuple[Int[np.ndarray, " rows"], _Batch]]:
    """The numbers of texts of similar length, and their padded tokens. A batch has
    `size` texts of the full length, or more shorter ones; none is longer than its
    longest text."""
    lengths = np.array([len(row) for row in tokens])
    longest = lengths.max(initial=1)
    ends = [length for length in _LENGTHS if length < longest]
    bucket = np.searchsorted(ends, lengths)
    for i, length in enumerate([*ends, longest]):
        rows = np.flatnonzero(bucket == i)
        at_once = size * max(CONTEXT // length, 1)
        for start in range(0, len(rows), at_once):
            some = rows[start : start + at_once]
            ids = np.zeros((at_once, length), np.int32)
            keep = np.zeros((at_once, length), bool)
            for j, row in enumerate(some):
                ids[j, : lengths[row]] = tokens[row]
                keep[j, : lengths[row]] = ~np.isin(tokens[row], special)
            yield some, _Batch(ids, keep)


@jax.jit
def _masked(
    reader: Reader,
    residual: Float[Array, "batch time d_model"],
    keep: Bool[Array | np.ndarray, "batch time"],
) -> tuple[Float[Array, "batch time d_model"], Float[Array, "batch d_model"]]:
    """x, set to 0 at tokens that do not count, and its mean over those that do."""
    x = reader.rows(residual).reshape(residual.shape)
    x = jnp.where(keep[..., None], x, 0.0)
    return x, _mean(x, keep)


@jit_encode
def _pool(
    reader: Reader,
    x: Float[Array | np.ndarray, "batch time d_model"],
    keep: Bool[Array | np.ndarray, "batch time"],
) -> Float[Array, "batch d_sae"]:
    """The mean over tokens that count of what latents add to x in their directions."""
    rows = x.reshape(-1, x.shape[-1])
    f = reader.encode(rows) * reader.row_scale(rows)
    f = f.reshape(*x.shape[:2], f.shape[-1])
    return _mean(jnp.where(keep[..., None], f, 0.0), keep)


def _mean(values: Array, keep: Array | np.ndarray) -> Array:
    n = jnp.maximum(jnp.sum(keep, axis=1), 1)
    return jnp.sum(values, axis=1) / n[:, None]


def _latents(reader: Reader, pooled: np.ndarray, stored_norms: bool) -> Latents:
    """The latents in units of x with directions of norm 1, or with `stored_norms` as
    the autoencoder has them."""
    at_zero = np.zeros(reader.config.d_sae, np.float32)
    if not reader.layer_norm:
        zero = jnp.zeros((1, reader.config.d_model))
        f = sae.encode(reader.variables, zero, config=reader.config)
        at_zero = np.asarray(f[0])
    if stored_norms:
        return Latents(pooled, at_zero, reader.directions)
    norms = np.linalg.norm(reader.directions, axis=1)
    directions = reader.directions / np.maximum(norms, 1e-30)[:, None]
    return Latents(pooled * norms, at_zero * norms, directions)
