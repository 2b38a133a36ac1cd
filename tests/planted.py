"""An autoencoder of which it is known what every latent fires on.

Rows are written by hand: at a token t the coordinate t mod 16 is 1 + position / 16, all
others are 0. The autoencoder is relu(x) - relu(-x), so that latent i fires on the
tokens with t mod 16 = i, most at the end of a context, and those from 16 on never.
"""

import dataclasses
from pathlib import Path

import numpy as np
from tiny_runs import D_MODEL, identity_arrays, write_run

from vsae_jax.activations.manifest import Manifest
from vsae_jax.activations.shards import Activations, ShardWriter


def write_rows(folder: Path, like: Path, tokens: np.ndarray | None = None) -> Path:
    """Activations as said above, of the tokens of the folder `like` or others."""
    source = Activations.open(like)
    tokens = source.tokens(0, source.n_contexts) if tokens is None else tokens
    m = source.manifest
    empty: Manifest = dataclasses.replace(
        m, shards=(), complete=False, mean=(), mean_squared_norm=0.0
    )
    folder.mkdir(parents=True)
    writer = ShardWriter(folder, empty)
    for index, start in enumerate(range(0, len(tokens), m.shard_contexts)):
        some = tokens[start : start + m.shard_contexts]
        writer.begin(index, some)
        writer.add(rows_of(some)[:, m.dropped_positions :].reshape(-1, D_MODEL))
        writer.commit()
    writer.finish()
    return folder


def rows_of(tokens: np.ndarray) -> np.ndarray:
    """`[contexts, length, d_model]`."""
    size = 1 + np.arange(tokens.shape[1]) / 16
    return (size[:, None] * np.eye(D_MODEL)[tokens % D_MODEL]).astype(np.float32)


def write_planted(folder: Path, like: Path, tokens: np.ndarray | None = None) -> Path:
    """Such an autoencoder's run folder, its activations beside it."""
    rows = write_rows(folder / "rows", like, tokens)
    arrays = identity_arrays()
    return write_run(folder / "run", rows, arrays, variant="relu")
