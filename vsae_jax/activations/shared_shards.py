"""Shards that several processes write, and one manifest of all of them.

Process p of n writes the shards p, p + n, p + 2 n, ... Beside each it leaves a small
file with the manifest's entry for it. At the end the first process puts these together
in the shards' order, so that the manifest has the bytes that one process would write.
"""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Int

from vsae_jax.activations.manifest import MANIFEST, Manifest, Shard, read_manifest
from vsae_jax.activations.shards import ShardWriter, is_missing
from vsae_jax.system import processes
from vsae_jax.system.files import npy_sha256, replace_file


def open_writer(folder: Path, manifest: Manifest) -> ShardWriter:
    """The writer of a folder: a shared one where there are several processes, or where
    several processes were stopped earlier."""
    left = next(folder.glob("shard-*.json"), None)
    shared = processes.agreed(processes.count() > 1 or left is not None)
    return (
        SharedShardWriter(folder, manifest) if shared else ShardWriter(folder, manifest)
    )


class SharedShardWriter(ShardWriter):
    """A ShardWriter of this process's share of the shards."""

    def __init__(self, folder: Path, manifest: Manifest):
        if processes.first():
            super().__init__(folder, manifest)
            # So that a run with other settings is refused before any shard is listed.
            replace_file(folder / MANIFEST, manifest.to_bytes())
        else:
            self.folder, self.manifest, self._files = folder, manifest, ()
        processes.wait("the folder is ready")

    def has(self, index: int, tokens: Int[np.ndarray, "contexts time"]) -> bool:
        """Whether the shard is there already, or another process will write it."""
        if super().has(index, tokens):
            return True
        if index % processes.count() != jax.process_index():
            return True
        note = self._note(index)
        if note is None or index < len(self.manifest.shards):
            return False
        same = note["shard"]["tokens_sha256"] == npy_sha256(tokens)
        return same and not is_missing(self.folder, index)

    def finish(self) -> None:
        """Once every process is done, makes one manifest of what all have written."""
        processes.wait("every shard is written")
        if processes.first():
            while (note := self._note(len(self.manifest.shards))) is not None:
                self._row_sum = np.array(note["row_sum"])
                self._squared_sum = note["squared_sum"]
                self._save(self._with(Shard(**note["shard"])))
            super().finish()
            for path in self.folder.glob("shard-*.json"):
                path.unlink()
        processes.wait("the manifest is written")
        found = read_manifest(self.folder)
        assert found is not None  # it was written just now
        self.manifest = found

    def _list(self, entry: Shard) -> None:
        note = {
            "shard": vars(entry),
            "row_sum": self._row_sum.tolist(),
            "squared_sum": self._squared_sum,
        }
        replace_file(self._path(self._index), json.dumps(note).encode())

    def _note(self, index: int) -> dict[str, Any] | None:
        path = self._path(index)
        return json.loads(path.read_bytes()) if path.is_file() else None

    def _path(self, index: int) -> Path:
        return self.folder / f"shard-{index:05d}.json"
