"""Activations made of known features, so that what an autoencoder finds can be marked.

    x = sum_i a_i d_i      a_i = 0.5 + Exp(1) where feature i fires, else 0

The directions d_i are random unit vectors, more of them than dimensions. Features fire
each by its own coin, or in groups: a group fires by a coin, and then each member with
probability 1/2. Rates fall as rank^-0.5 and sum to the asked mean number of firing
features either way; the members of a group have the mean of their rates.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float

from experiments.scales import Truth
from vsae_jax.activations.manifest import Manifest, read_manifest
from vsae_jax.activations.shards import ShardWriter, is_missing
from vsae_jax.system import locks
from vsae_jax.system.errors import UserError

FILE = "features.npy"
CONTEXT_LENGTH = 128
SHARD_CONTEXTS = 1024
PIECE_BYTES = 2**26
_LEAST, _SLOPE = 0.5, 0.5
# Streams of random numbers under one seed; shard i is stream _SHARDS + i.
_DIRECTIONS, _HELD_OUT, _SHARDS = range(3)


@dataclass(frozen=True)
class Features:
    """directions: `[n_features, d_model]`, of norm 1. rates: `[n_features]`, the share
    of rows on which each fires. group: features that fire together; 1 is none."""

    directions: Float[np.ndarray, "n_features d_model"]
    rates: Float[np.ndarray, " n_features"]
    group: int

    def fires(self, n: int, rng: np.random.Generator) -> Bool[np.ndarray, "n features"]:
        """Which features fire on each of n rows."""
        size = n, len(self.rates)
        if self.group == 1:
            return rng.random(size, np.float32) < self.rates
        in_group = rng.random((n, size[1] // self.group), np.float32)
        together = in_group < 2 * self.rates[:: self.group]
        return np.repeat(together, self.group, 1) & (rng.random(size, np.float32) < 0.5)

    def codes(self, n: int, rng: np.random.Generator) -> Float[np.ndarray, "n feature"]:
        """The amplitudes a of n rows, 0 where a feature does not fire; float32."""
        fires = self.fires(n, rng)
        codes = np.zeros(fires.shape, np.float32)
        amplitudes = rng.standard_exponential(int(fires.sum()), np.float32)
        codes[fires] = np.float32(_LEAST) + amplitudes
        return codes


def make_features(truth: Truth, *, correlated: bool, seed: int = 0) -> Features:
    """The features of a size and a seed; the directions are the same either way."""
    n, group = truth.n_features, truth.group if correlated else 1
    if n % group:
        raise UserError(f"n_features={n} is not a multiple of group={group}")
    rates = np.arange(1, n + 1) ** -_SLOPE
    rates = rates * truth.active / rates.sum()
    rates = np.repeat(rates.reshape(-1, group).mean(1), group)
    if rates[0] * (2 if correlated else 1) > 1:
        raise UserError(f"active={truth.active} is too many of n_features={n}")
    directions = _rng(seed, _DIRECTIONS).standard_normal((n, truth.d_model))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    return Features(directions.astype(np.float32), rates.astype(np.float32), group)


def held_out(
    features: Features, n: int, *, seed: int = 0
) -> tuple[Float[np.ndarray, "n d_model"], Float[np.ndarray, "n n_features"]]:
    """n rows that no folder holds, and their codes."""
    codes = features.codes(n, _rng(seed, _HELD_OUT))
    return codes @ features.directions, codes


def write(folder: Path, truth: Truth, *, correlated: bool, seed: int = 0) -> Path:
    """A folder of activations as `extract` writes it, and `features.npy`, the
    directions. Shards that are there are left; a finished folder stays as it is."""
    features = make_features(truth, correlated=correlated, seed=seed)
    wanted = _manifest(truth, features, seed)
    found = read_manifest(folder)
    if found is not None and found.config_hash != wanted.config_hash:
        raise UserError(
            f"{folder} holds rows of other features; delete it or give another --out"
        )
    if found is not None and found.complete and not _missing(folder, found):
        return folder
    with locks.held(folder, doing="synthetic"):
        np.save(folder / FILE, features.directions, allow_pickle=False)
        writer = ShardWriter(folder, read_manifest(folder) or wanted)
        try:
            _write_shards(writer, features, wanted.num_tokens // CONTEXT_LENGTH, seed)
        finally:
            writer.abandon()
    return folder


def shard_codes(
    features: Features, n: int, *, shard: int, seed: int = 0
) -> Iterator[Float[np.ndarray, "rows n_features"]]:
    """The codes of the n rows of a shard, in pieces."""
    rng = _rng(seed, _SHARDS + shard)
    piece = max(PIECE_BYTES // (4 * len(features.rates)), 1)
    for start in range(0, n, piece):
        yield features.codes(min(piece, n - start), rng)


def _write_shards(
    writer: ShardWriter, features: Features, contexts: int, seed: int
) -> None:
    for index, first in enumerate(range(0, contexts, SHARD_CONTEXTS)):
        n = min(SHARD_CONTEXTS, contexts - first)
        tokens = np.zeros((n, CONTEXT_LENGTH), np.int32)
        if writer.has(index, tokens):
            continue
        writer.begin(index, tokens)
        for codes in shard_codes(features, tokens.size, shard=index, seed=seed):
            writer.add(codes @ features.directions)
        writer.commit()
    writer.finish()


def _missing(folder: Path, manifest: Manifest) -> bool:
    shards = any(is_missing(folder, i) for i in range(len(manifest.shards)))
    return shards or not (folder / FILE).is_file()


def _manifest(truth: Truth, features: Features, seed: int) -> Manifest:
    """Of a folder with no shard yet; whole contexts, as many rows as asked or more."""
    size = {name: getattr(truth, name) for name in _SIZE}
    settings = json.dumps([size, features.group, seed]).encode()
    return Manifest(
        model="synthetic",
        revision="",
        revision_asked="",
        backend="numpy",
        config_hash=hashlib.sha256(settings).hexdigest(),
        tokenizer_hash="",
        hook_name="synthetic",
        layer=0,
        d_model=truth.d_model,
        vocab_size=1,
        dtype="float32",
        context_length=CONTEXT_LENGTH,
        bos="none",
        bos_id=0,
        special_ids=(),
        skip_positions=0,
        center_residual=False,
        dataset="synthetic",
        split="",
        text_column="",
        num_tokens=-(-truth.n_rows // CONTEXT_LENGTH) * CONTEXT_LENGTH,
        shard_contexts=SHARD_CONTEXTS,
    )


_SIZE = ("d_model", "n_features", "active", "n_rows")


def _rng(seed: int, stream: int) -> np.random.Generator:
    return np.random.default_rng([seed, stream])
