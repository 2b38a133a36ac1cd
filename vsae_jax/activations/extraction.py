"""Contexts -> language model -> rows -> shards.

Text becomes contexts in one thread, and rows are written in another. The model runs in
the main thread, because torch's OpenMP is slow in any other.

Every shard starts a new batch, so that its rows depend on its own contexts alone. A run
that was killed and goes on therefore ends with the bits of an undisturbed one.
"""

import collections
import functools
import itertools
from collections.abc import Iterator, Sequence
from concurrent import futures
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from vsae_jax.activations.manifest import Manifest
from vsae_jax.activations.shards import ShardWriter
from vsae_jax.lm import LanguageModel
from vsae_jax.system import progress, signals
from vsae_jax.system.errors import Interrupted, UserError

# Bytes of rows that may wait for the disk while the shard before is synced.
_WAITING_BYTES = 2**26

Tokens = Int[np.ndarray, "contexts context_length"]


@functools.partial(jax.jit, static_argnames=("dropped", "center", "dtype"))
def to_rows(
    residual: Float[Array | np.ndarray, "batch time d_model"],
    *,
    dropped: int,
    center: bool,
    dtype: str,
) -> Float[Array, "rows d_model"]:
    """The rows of every position but the first `dropped`, in `dtype`; `center`
    subtracts each row's mean over d_model."""
    rows = jnp.asarray(residual)[:, dropped:].reshape(-1, residual.shape[-1])
    if center:
        rows = rows - rows.mean(axis=-1, keepdims=True)
    return rows.astype(dtype)


class Piece(NamedTuple):
    """The rows of one batch, on their way to shard `index`.

    tokens: the tokens of the whole shard, `[contexts, context_length]`.
    start: the context of the shard with which the batch starts.
    rows: the batch's rows for each writer that lacks the shard, still on the device and
      with padding.
    n_contexts: the number of contexts in the batch, without padding.
    """

    index: int
    tokens: Tokens
    start: int
    rows: list[tuple[ShardWriter, Float[Array, "rows d_model"]]]
    n_contexts: int


def blocks(
    contexts: Iterator[Int[np.ndarray, " context_length"]], *, total: int, size: int
) -> Iterator[Tokens]:
    """The contexts in stacks of `size`, at most `total` contexts in all."""
    contexts = itertools.islice(contexts, total)
    while block := list(itertools.islice(contexts, size)):
        yield np.stack(block)


def pieces(
    shards: Iterator[Tokens],
    writers: Sequence[ShardWriter],
    model: LanguageModel,
    *,
    batch_size: int,
) -> Iterator[Piece]:
    """Runs the model, for all writers in one pass, on the shards that any of them
    lacks. The writers' manifests differ in their hook and in the shards that are there.

    The model always runs for all hooks, so that a shard's bits do not depend on which
    writers lack it.
    """
    m, hooks = writers[0].manifest, [writer.manifest.hook for writer in writers]
    batch = min(batch_size, m.shard_contexts)
    for index, tokens in enumerate(shards):
        lack = [writer for writer in writers if not writer.has(index, tokens)]
        for start in range(0, len(tokens) if lack else 0, batch):
            part = tokens[start : start + batch]
            padded = np.pad(part, ((0, batch - len(part)), (0, 0)))
            found = zip(writers, model.at(padded, hooks), strict=True)
            rows = [
                (writer, rows_for(writer.manifest, values))
                for writer, values in found
                if writer in lack
            ]
            yield Piece(index, tokens, start, rows, len(part))


def rows_for(
    m: Manifest, values: Float[Array | np.ndarray, "batch time d_model"]
) -> Float[Array, "rows d_model"]:
    """What a folder keeps of the values at its hook."""
    return to_rows(
        values, dropped=m.dropped_positions, center=m.center_residual, dtype=m.dtype
    )


def write(
    writers: Sequence[ShardWriter],
    pieces: Iterator[Piece],
    caught: signals.Caught,
    *,
    bar: progress.Bar | progress.Lines,
) -> None:
    """Writes the pieces, which come in order, in a thread, so that the model goes on in
    this one while bytes are hashed and synced. Where the text ends with a UserError,
    that is raised once the shards before it are written."""
    length = writers[0].manifest.context_length
    written: collections.deque[futures.Future[Piece]] = collections.deque()
    last: futures.Future[Piece] | None = None

    def finish_first() -> None:
        # Asked often: with small pieces and a slow disk, much may wait to be written.
        if caught.signal:
            raise _interrupted(writers, caught.signal)
        bar.update(written.popleft().result().n_contexts * length)

    disk = futures.ThreadPoolExecutor(1, "disk")
    try:
        with bar:
            try:
                for piece in pieces:
                    if caught.signal:
                        raise _interrupted(writers, caught.signal)
                    last = disk.submit(_write_piece, piece, after=last)
                    written.append(last)
                    n_bytes = sum(rows.nbytes for _, rows in piece.rows)
                    while len(written) > max(_WAITING_BYTES // n_bytes, 2):
                        finish_first()
            except UserError:
                while written:
                    finish_first()
                raise
            while written:
                finish_first()
    finally:
        disk.shutdown(cancel_futures=True)
    for writer in writers:
        writer.finish()


def _write_piece(piece: Piece, *, after: "futures.Future[Piece] | None") -> Piece:
    """Adds the piece to its shards; raises what the piece before it raised."""
    if after is not None:
        after.result()
    for writer, rows in piece.rows:
        if piece.start == 0:
            writer.begin(piece.index, piece.tokens)
        n_rows = piece.n_contexts * writer.manifest.rows_per_context
        writer.add(np.asarray(rows)[:n_rows])
        if piece.start + piece.n_contexts == len(piece.tokens):
            writer.commit()
    return piece


def _interrupted(writers: Sequence[ShardWriter], number: int) -> Interrupted:
    return Interrupted(
        f"stopped by a signal; {safe(writers)}: run the same command to go on",
        signal_number=number,
    )


def safe(writers: Sequence[ShardWriter]) -> str:
    """A list of how many shards are in which folder."""
    return ", ".join(
        f"{len(writer.manifest.shards)} shards are safe in {writer.folder}"
        for writer in writers
    )
