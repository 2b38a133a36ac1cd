"""Texts -> tokens -> language model -> latents, pooled over the tokens of each text.

SAEBench's pooling (docs/saebench.md 2.1): special tokens and padding count for nothing;
a text's vector is the mean over its other tokens of x, or of the latents of each token.
One pass of the language model serves all autoencoders of a grid.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from vsae_jax.activations import text
from vsae_jax.autoencoder import sae
from vsae_jax.autoencoder.layer_norm import normalise_rows
from vsae_jax.autoencoder.sae import Variables
from vsae_jax.autoencoder.sparsity import compiler_options
from vsae_jax.config import SAEConfig
from vsae_jax.evals import Subject
from vsae_jax.system import progress

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CONTEXT = 128
# Texts of like length share a batch, cut to one of these.
_LENGTHS = (16, 32, 64, CONTEXT)


class Pooled(NamedTuple):
    """Means over the tokens of each text: x of the language model, and the number of
    tokens that count; 0 where a text has none."""

    x: Float[np.ndarray, "texts d_model"]
    n_valid: Int[np.ndarray, " texts"]


class Latents(NamedTuple):
    """An autoencoder's latents, pooled, with what an ablation takes away for each.

    at_zero: latents of x = 0. directions: x per unit of a latent, `[d_sae, d_model]`.
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
    """`bos` and the text's ids, cut at `length`."""
    ids: list[np.ndarray] = []
    for start in range(0, len(texts), text.DOCUMENTS_AT_ONCE):
        part = list(texts[start : start + text.DOCUMENTS_AT_ONCE])
        encoded = text.encode(part, tokenizer)
        ids += [np.array((bos + row)[:length], np.int32) for row in encoded]
    return ids


def encode_texts(
    subjects: Sequence[Subject],
    tokens: Sequence[Int[np.ndarray, " tokens"]],
    *,
    stored_norms: bool,
) -> tuple[Pooled, list[Latents]]:
    """Pooled vectors of the texts and of each subject's latents on them. The subjects
    share their language model and layer."""
    lm, data = subjects[0].lm, subjects[0].run.data
    x = np.zeros((len(tokens), lm.d_model), np.float32)
    n_valid = np.zeros(len(tokens), np.int32)
    pooled = [np.zeros((len(tokens), s.run.sae.d_sae), np.float32) for s in subjects]
    size = subjects[0].batch_size
    with progress.bar(len(tokens), unit="text") as bar:
        special = sorted(lm.special_ids)
        for rows, batch in _batches(tokens, size, special, most=lm.max_positions):
            residual = jnp.asarray(lm.residual(batch.tokens, data["layer"]))
            masked, mean = _masked(residual, batch.keep, center=data["center_residual"])
            n = len(rows)
            x[rows], n_valid[rows] = mean[:n], batch.keep[:n].sum(axis=1)
            for subject, out in zip(subjects, pooled, strict=True):
                out[rows] = _pooled(subject, masked, batch.keep)[:n]
            bar.update(n)
    each = zip(subjects, pooled, strict=True)
    return Pooled(x, n_valid), [_latents(s, p, stored_norms) for s, p in each]


def residuals_at(
    subject: Subject,
    tokens: Sequence[Int[np.ndarray, " tokens"]],
    places: Int[np.ndarray, " texts"],
) -> Float[np.ndarray, "texts d_model"]:
    """One position's row of each text, as the subject was trained on."""
    language_model, data = subject.lm, subject.run.data
    found = np.zeros((len(tokens), language_model.d_model), np.float32)
    with progress.bar(len(tokens), unit="text") as bar:
        most = language_model.max_positions
        for rows, batch in _batches(tokens, subject.batch_size, [], most=most):
            residual = jnp.asarray(language_model.residual(batch.tokens, data["layer"]))
            own = residual[np.arange(len(rows)), places[rows]][:, None]
            found[rows] = rows_of(own, center=data["center_residual"])
            bar.update(len(rows))
    return found


def encode_residuals(
    subject: Subject, x: Float[np.ndarray, "rows d_model"], *, stored_norms: bool
) -> tuple[Float[np.ndarray, "rows d_sae"], Float[np.ndarray, "d_sae d_model"]]:
    """Latents of single rows, and their directions, in the units of `Latents`."""
    size = subject.batch_size * CONTEXT
    padded = np.pad(x, ((0, -len(x) % size), (0, 0))).reshape(-1, size, 1, x.shape[1])
    keep = np.ones((size, 1), bool)
    f = [_pooled(subject, jnp.asarray(part), keep) for part in padded]
    latents = _latents(subject, np.concatenate(f)[: len(x)], stored_norms)
    return latents.pooled, latents.directions


def rows_of(
    residual: Float[Array, "batch time d_model"], *, center: bool
) -> Float[Array, "rows d_model"]:
    """Every position as a row, as trained on."""
    x = residual.reshape(-1, residual.shape[-1])
    return x - jnp.mean(x, axis=-1, keepdims=True) if center else x


def encode_rows(
    variables: Variables,
    x: Float[Array, "rows d_model"],
    *,
    config: SAEConfig,
    layer_norm: bool,
) -> tuple[Float[Array, "rows d_sae"], Array | None, Array | None]:
    """Latents; with a LayerNorm per row also its mean and standard deviation."""
    if not layer_norm:
        return sae.encode(variables, x, config=config), None, None
    x, mean, std = normalise_rows(x)
    return sae.encode(variables, x, config=config), mean, std


class _Batch(NamedTuple):
    tokens: Int[np.ndarray, "batch time"]
    keep: Bool[np.ndarray, "batch time"]


def _batches(
    tokens: Sequence[Int[np.ndarray, " tokens"]],
    size: int,
    special: list[int],
    *,
    most: int | None,
) -> Iterator[tuple[Int[np.ndarray, " rows"], _Batch]]:
    """Numbers of texts of like length, and their padded tokens. `size` is in texts of
    the full length; of shorter ones more are taken. No batch is longer than `most`."""
    lengths = np.array([len(row) for row in tokens])
    longest = max(CONTEXT, lengths.max(initial=0))
    longest = min(longest, most or longest)
    ends = [length for length in _LENGTHS if length < min(CONTEXT, longest)]
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


@partial(jax.jit, static_argnames=("center",))
def _masked(
    residual: Float[Array, "batch time d_model"],
    keep: Bool[Array | np.ndarray, "batch time"],
    *,
    center: bool,
) -> tuple[Float[Array, "batch time d_model"], Float[Array, "batch d_model"]]:
    """x, 0 where nothing counts, and its mean over what counts."""
    x = rows_of(residual, center=center).reshape(residual.shape)
    x = jnp.where(keep[..., None], x, 0.0)
    return x, _mean(x, keep)


def _pooled(
    subject: Subject,
    x: Float[Array, "batch time d_model"],
    keep: Bool[np.ndarray, "batch time"],
) -> Float[np.ndarray, "batch d_sae"]:
    run = subject.run
    layer_norm = run.data.get("layer_norm", False)
    pooled = _pool_jit()(run.variables, x, keep, config=run.sae, layer_norm=layer_norm)
    return np.asarray(pooled)


@cache
def _pool_jit() -> Callable[..., Array]:
    static, options = ("config", "layer_norm"), compiler_options()
    return jax.jit(_pool, static_argnames=static, compiler_options=options)


def _pool(
    variables: Variables,
    x: Float[Array, "batch time d_model"],
    keep: Bool[Array | np.ndarray, "batch time"],
    *,
    config: SAEConfig,
    layer_norm: bool,
) -> Float[Array, "batch d_sae"]:
    rows = x.reshape(-1, x.shape[-1])
    f, _, std = encode_rows(variables, rows, config=config, layer_norm=layer_norm)
    # What a latent adds to x grows with the row's standard deviation.
    f = f if std is None else f * std
    f = f.reshape(*x.shape[:2], f.shape[-1])
    return _mean(jnp.where(keep[..., None], f, 0.0), keep)


def _mean(values: Array, keep: Array | np.ndarray) -> Array:
    n = jnp.maximum(jnp.sum(keep, axis=1), 1)
    return jnp.sum(values, axis=1) / n[:, None]


def _latents(subject: Subject, pooled: np.ndarray, stored_norms: bool) -> Latents:
    """In the units of x, their directions of norm 1, unless `stored_norms`."""
    run = subject.run
    zero = jnp.zeros((1, run.sae.d_model))
    at_zero = jnp.zeros((1, run.sae.d_sae))
    if not run.data.get("layer_norm", False):
        at_zero = sae.encode(run.variables, zero, config=run.sae)
    scale = float(run.variables["norm"]["scale"])
    directions = np.asarray(run.variables["params"]["w_dec"]) / scale
    if stored_norms:
        return Latents(pooled, np.asarray(at_zero[0]), directions)
    norms = np.linalg.norm(directions, axis=1)
    directions = directions / np.maximum(norms, 1e-30)[:, None]
    pooled = pooled * norms
    return Latents(pooled, np.asarray(at_zero[0]) * norms, directions)
