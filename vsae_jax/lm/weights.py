"""A hash of the weights of a local model, which tells them from other weights."""

import functools
import hashlib
from pathlib import Path

from vsae_jax.lm.files import ModelFiles

_KINDS = ("*.safetensors", "*.bin")
# At most so many pieces of so many bytes of a file are read.
_PIECES, _PIECE_BYTES = 256, 2**20


def weights_hash(files: ModelFiles) -> str:
    """The sha256 over the name, size and bytes of each weight file in a local folder
    (of a large file 256 MiB in evenly spaced pieces); "" for a hub id, whose commit
    says it."""
    if files.folder is None:
        return ""
    paths = sorted(p for kind in _KINDS for p in files.folder.glob(kind))
    return _hash(tuple((p, p.stat().st_size, p.stat().st_mtime_ns) for p in paths))


@functools.lru_cache(maxsize=8)
def _hash(paths: tuple[tuple[Path, int, int], ...]) -> str:
    """The hash of files given with sizes and times, made once for all runs of a
    command."""
    digest = hashlib.sha256()
    for path, size, _ in paths:
        digest.update(f"{path.name} {size} ".encode())
        with path.open("rb") as file:
            for start in range(0, size, max(size // _PIECES, _PIECE_BYTES)):
                file.seek(start)
                digest.update(file.read(_PIECE_BYTES))
    return digest.hexdigest()
