"""Activations on disk: a manifest and memory-mapped NumPy shards.

    manifest.json           see activations/manifest.py
    activations-00000.npy   [rows, d_model]; bfloat16 as its raw 2-byte values (uint16)
    tokens-00000.npy        [contexts, context_length] int32

Every shard but the last has `shard_contexts` contexts. Row r belongs to the context
r // rows_per_context, at the position dropped_positions + r % rows_per_context.
"""

import dataclasses
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from vsae_jax.activations.manifest import (
    MANIFEST,
    READ,
    STORED,
    Manifest,
    Shard,
    read_manifest,
)
from vsae_jax.system import progress
from vsae_jax.system.errors import UserError
from vsae_jax.system.files import (
    TEMPORARY,
    NpyWriter,
    npy_sha256,
    open_verified,
    replace_file,
    sync_folder,
)

# What a run's config.json says of its activations.
_OF_RUNS = (
    "model",
    "revision",
    "weights_hash",
    "hook_name",
    "layer",
    "context_length",
    "bos",
    "dropped_positions",
    "center_residual",
    "dataset",
    "dtype",
)


def activations_path(folder: Path, index: int) -> Path:
    """The file with the rows of shard `index`."""
    return folder / f"activations-{index:05d}.npy"


def tokens_path(folder: Path, index: int) -> Path:
    """The file with the tokens of shard `index`."""
    return folder / f"tokens-{index:05d}.npy"


def is_missing(folder: Path, index: int) -> bool:
    """Whether a file of shard `index` is not there."""
    paths = activations_path(folder, index), tokens_path(folder, index)
    return not all(path.is_file() for path in paths)


class Activations:
    """The rows and tokens of a finished folder, read without loading whole shards.

    Each file's checksum, size, shape and dtype are verified before its first use; an
    error names the file. Any number of threads may read.
    """

    # Whether rows can only be read once, in their order.
    in_order = False

    def __init__(self, folder: Path, manifest: Manifest):
        self.folder, self.manifest = folder, manifest
        self.n_rows, self.n_contexts = manifest.n_rows, manifest.n_contexts
        self.rows_per_context = manifest.rows_per_context
        self.d_model = manifest.d_model
        self.row_bytes = manifest.row_bytes
        self._verified: dict[Path, np.ndarray] = {}

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> "Activations":
        """The activations in `folder`, which `extract` must have finished."""
        folder = Path(folder)
        manifest = read_manifest(folder)
        if manifest is None:
            raise UserError(
                f"no activations in {folder}; make them with: "
                f"python -m vsae_jax.extract --out={folder}, or name another folder "
                "by --activations"
            )
        if not manifest.complete:
            raise UserError(
                f"extraction is not finished in {folder}: run extract again, with the "
                "same settings, and it goes on"
            )
        return cls(folder, manifest)

    def rows(self, start: int, stop: int) -> Float[np.ndarray, "rows d_model"]:
        """A copy of the rows start, ..., stop - 1, in the manifest's dtype."""
        return self.view(start, stop).copy()

    def view(self, start: int, stop: int) -> Float[np.ndarray, "rows d_model"]:
        """The rows start, ..., stop - 1, in the manifest's dtype, read-only; a copy
        only where they lie in several shards."""
        pieces = self._pieces(start, stop, unit=self.rows_per_context)
        parts = [self.activations_shard(index)[within] for index, within in pieces]
        dtype = self.manifest.dtype
        empty = np.empty((0, self.d_model), STORED[dtype])
        rows = (
            np.asarray(parts[0]) if len(parts) == 1 else np.concatenate([*parts, empty])
        )
        rows = rows.view(READ[dtype])
        rows.flags.writeable = False
        return rows

    def tokens(
        self, start: int, stop: int
    ) -> Int[np.ndarray, "contexts context_length"]:
        """A copy of the tokens of the contexts start, ..., stop - 1."""
        pieces = self._pieces(start, stop, unit=1)
        parts = [self.tokens_shard(index)[within] for index, within in pieces]
        empty = np.empty((0, self.manifest.context_length), np.int32)
        return np.concatenate([*parts, empty])

    def activations_shard(self, index: int) -> np.ndarray:
        """A verified memory map `[rows, d_model]` of one shard, as it is stored."""
        path, shard = activations_path(self.folder, index), self.manifest.shards[index]
        shape, dtype = (shard.rows, self.d_model), STORED[self.manifest.dtype]
        return self._map(path, shape, dtype, shard.activations_sha256)

    def tokens_shard(self, index: int) -> np.ndarray:
        """A verified memory map `[contexts, context_length]` of one shard."""
        path, shard = tokens_path(self.folder, index), self.manifest.shards[index]
        shape = shard.contexts, self.manifest.context_length
        return self._map(path, shape, np.int32, shard.tokens_sha256)

    def _map(
        self, path: Path, shape: tuple[int, int], dtype: Any, sha256: str
    ) -> np.ndarray:
        if path not in self._verified:
            self._verified[path] = open_verified(
                path, shape=shape, dtype=dtype, sha256=sha256
            )
        return self._verified[path]

    def located(self, row: int) -> tuple[Path, str]:
        """The file that holds a row, and a description of the row."""
        m = self.manifest
        context, at = divmod(row, m.rows_per_context)
        path = activations_path(self.folder, context // m.shard_contexts)
        return path, f"that of context {context}, position {m.dropped_positions + at}"

    def described(self) -> dict[str, Any]:
        """What a run's config.json says of them."""
        m = self.manifest
        return {"manifest": m.hash, **{name: getattr(m, name) for name in _OF_RUNS}}

    def verify(self, shards: Sequence[int]) -> None:
        """Reads both files of these shards and compares checksums; the first damaged
        one is named."""
        with progress.bar(len(shards), unit="shards verified") as bar:
            for index in shards:
                self.activations_shard(index)
                self.tokens_shard(index)
                bar.update(1)

    def _pieces(
        self, start: int, stop: int, *, unit: int
    ) -> Iterator[tuple[int, slice]]:
        """(shard, slice) pairs that cover start, ..., stop - 1; `unit` per context."""
        if not 0 <= start <= stop <= self.n_contexts * unit:
            raise IndexError(
                f"[{start}, {stop}) is not within [0, {self.n_contexts * unit})"
            )
        size = self.manifest.shard_contexts * unit
        while start < stop:
            index, offset = divmod(start, size)
            n = min(size - offset, stop - start)
            yield index, slice(offset, offset + n)
            start += n


class ShardWriter:
    """Writes one shard after the other: `begin`, `add` until all rows are there,
    `commit`; at the end `finish`.

    A shard is written under a temporary name, synced and renamed, and only then
    listed in the manifest, so a kill costs at most the shard that was being written.
    """

    def __init__(self, folder: Path, manifest: Manifest):
        self.folder, self.manifest = folder, manifest
        self._files: tuple[NpyWriter, ...] = ()
        for kind in ("activations-*.npy", "tokens-*.npy", MANIFEST):
            for stale in folder.glob(kind + TEMPORARY):
                stale.unlink()

    def has(self, index: int, tokens: Int[np.ndarray, "contexts time"]) -> bool:
        """Whether the shard is there already; it must have been made of `tokens`."""
        if index >= len(self.manifest.shards):
            return False
        if npy_sha256(tokens) != self.manifest.shards[index].tokens_sha256:
            raise UserError(
                f"the text is not the one that shard {index} of {self.folder} was made "
                "from; give the old text or another --out"
            )
        return not is_missing(self.folder, index)

    def begin(self, index: int, tokens: Int[np.ndarray, "contexts time"]) -> None:
        """Opens shard `index`, of the contexts in `tokens`."""
        m = self.manifest
        self._index, self._contexts, self._rows = index, len(tokens), 0
        self._row_sum, self._squared_sum = np.zeros(m.d_model), 0.0
        shape = (len(tokens) * m.rows_per_context, m.d_model)
        tokens_file = NpyWriter(
            tokens_path(self.folder, index), shape=tokens.shape, dtype=np.int32
        )
        self._files = (tokens_file,)
        rows_file = NpyWriter(
            activations_path(self.folder, index), shape=shape, dtype=STORED[m.dtype]
        )
        self._files = (tokens_file, rows_file)
        tokens_file.add(tokens)

    def add(self, rows: Float[np.ndarray, "rows d_model"]) -> None:
        """Appends rows, in the manifest's dtype, to the open shard."""
        exact = rows.astype(np.float64)
        squared_sum = float(np.einsum("ij,ij->", exact, exact))
        if not np.isfinite(squared_sum):
            self._refuse_non_finite(exact)
        self._row_sum += exact.sum(0)
        self._squared_sum += squared_sum
        self._rows += len(rows)
        self._files[1].add(rows.view(STORED[self.manifest.dtype]))

    def _refuse_non_finite(self, rows: np.ndarray) -> None:
        m = self.manifest
        row = self._rows + int(np.isfinite(rows).all(1).argmin())
        context = self._index * m.shard_contexts + row // m.rows_per_context
        position = m.dropped_positions + row % m.rows_per_context
        hint = "; float16 ends at 65504, use --dtype=bfloat16"
        raise UserError(
            f"{m.hook_name} is not finite in context {context} at position {position}"
            f"{hint if m.dtype == 'float16' else ''}"
        )

    def commit(self) -> None:
        """Moves the open shard to its place and lists it in the manifest."""
        m, files = self.manifest, self._files
        tokens_sha256, activations_sha256 = (file.close() for file in files)
        entry = Shard(self._contexts, self._rows, activations_sha256, tokens_sha256)
        listed = self._index < len(m.shards)
        if listed and entry != m.shards[self._index]:
            raise UserError(
                f"shard {self._index} differs from what {MANIFEST} in {self.folder} "
                "records (another machine, version or model?); extract again into "
                "another --out"
            )
        for file in files:
            file.publish()
        self._files = ()
        sync_folder(self.folder)
        if not listed:
            self._list(entry)

    def _list(self, entry: Shard) -> None:
        self._save(self._with(entry))

    def _with(self, entry: Shard) -> Manifest:
        """The manifest with one more shard. Its statistics depend on the old ones and
        the shard alone, so that a resumed run gives the bits of an undisturbed one."""
        m, total = self.manifest, self.manifest.n_rows + entry.rows
        old_sum = np.array(m.mean) * m.n_rows if m.shards else 0.0
        return dataclasses.replace(
            m,
            shards=(*m.shards, entry),
            mean=tuple(((old_sum + self._row_sum) / total).tolist()),
            mean_squared_norm=(m.mean_squared_norm * m.n_rows + self._squared_sum)
            / total,
        )

    def finish(self) -> None:
        """Marks the folder as complete."""
        self._save(dataclasses.replace(self.manifest, complete=True))

    def abandon(self) -> None:
        """Removes the shard that is open, if any."""
        for file in self._files:
            file.abandon()
        self._files = ()

    def _save(self, manifest: Manifest) -> None:
        if manifest != self.manifest:
            replace_file(self.folder / MANIFEST, manifest.to_bytes())
            self.manifest = manifest
