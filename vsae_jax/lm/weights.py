"""What tells the weights of one local model from those of another."""

import functools
import hashlib
from pathlib import Path

from vsae_jax.lm.files import ModelFiles

_KINDS = ("*.safetensors", "*.bin")
# Of a file, what is read at most.
_PIECES, _PIECE_BYTES = 256, 2**20


def weights_hash(files: ModelFiles) -> str:
    """Tells the weights in a local folder from others: sha256 of each file's name, size
    and bytes, of a large one 256 MiB in evenly spaced pieces; "" for a hub id, whose
    commit says it."""
    if files.folder is None:
        return ""
    paths = sorted(p for kind in _KINDS for p in files.folder.glob(kind))
    return _hash(tuple((p, p.stat().st_size, p.stat().st_mtime_ns) for p in paths))


@functools.lru_cache(maxsize=8)
def _hash(paths: tuple[tuple[Path, int, int], ...]) -> str:
    """The same of files with their sizes and times, once for all runs of a command."""
    digest = hashlib.sha256()
    for path, size, _ in paths:
        digest.update(f"{path.name} {size} ".encode())
        with path.open("rb") as file:
            for start in range(0, size, max(size // _PIECES, _PIECE_BYTES)):
                file.seek(start)
                digest.update(file.read(_PIECE_BYTES))
    return digest.hexdigest()
