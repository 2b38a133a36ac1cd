"""`.pt` files without torch, and without running anything that they say.

A `.pt` file is a zip, uncompressed: `<name>/data.pkl` is a pickle whose tensors point
at `<name>/data/<key>`. The pickle is read by `unpickle.py`.
"""

import zipfile
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from vsae_jax.interop.unpickle import Storage, read_pickle
from vsae_jax.system.errors import UserError, one_line

MAX_PICKLE_BYTES = 2**20
_MAX_ENTRIES = 1024
# What zipfile raises on damaged files: OSError where it seeks before the start.
_NO_ZIP = (zipfile.BadZipFile, EOFError, NotImplementedError, ValueError, OSError)


def read_pt(path: Path) -> Any:
    """What `torch.save` wrote: a tree of dicts, lists and numbers with arrays in it."""
    try:
        with zipfile.ZipFile(path) as archive:
            return _read(archive, path)
    except _NO_ZIP as error:
        raise UserError(
            f"{path} is not a .pt file of torch 1.6 or later: {one_line(error)}"
        ) from None


def _read(archive: zipfile.ZipFile, path: Path) -> Any:
    entries = {info.filename: info for info in archive.infolist()}
    _check_entries(archive.infolist(), path)
    pickles = [name for name in entries if name.endswith("/data.pkl")]
    if len(pickles) != 1 or pickles[0].count("/") != 1:
        raise UserError(f"{path} is a zip without one <name>/data.pkl")
    root = pickles[0].removesuffix("data.pkl")
    order = entries.get(root + "byteorder")
    if order and (order.file_size > 16 or archive.read(order).strip() != b"little"):
        raise UserError(f"{path} is not little-endian")
    if entries[pickles[0]].file_size > MAX_PICKLE_BYTES:
        raise UserError(
            f"{path}: {pickles[0]} has {entries[pickles[0]].file_size} bytes; at most "
            f"{MAX_PICKLE_BYTES} are read"
        )

    def stored(storage: Storage) -> np.ndarray:
        name = f"{root}data/{storage.key}"
        if name not in entries:
            raise UserError(f"{path} lacks {name}, which its pickle names")
        data = archive.read(entries[name])
        if len(data) != storage.numel * storage.dtype.itemsize:
            raise UserError(
                f"{path}: {name} has {len(data)} bytes, expected "
                f"{storage.numel} of {storage.dtype}"
            )
        return np.frombuffer(data, storage.dtype)

    data, budget = archive.read(pickles[0]), path.stat().st_size
    return read_pickle(data, path=path, stored=stored, budget=budget)


def _check_entries(entries: list[zipfile.ZipInfo], path: Path) -> None:
    """Refuses what torch never writes and may be an attack."""
    names = [info.filename for info in entries]
    if len(names) > _MAX_ENTRIES or len(set(names)) != len(names):
        raise UserError(f"{path} has over {_MAX_ENTRIES} entries, or one twice")
    for info in entries:
        parts = PurePosixPath(info.filename).parts
        odd = "\\" in info.filename or not info.filename.isprintable()
        if odd or ".." in parts or info.filename.startswith("/"):
            raise UserError(f"{path} has an entry named {info.filename[:80]!r}")
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
            raise UserError(
                f"{path}: {info.filename[:80]} is compressed or encrypted; torch "
                "writes neither"
            )
    if sum(info.file_size for info in entries) > path.stat().st_size:
        raise UserError(f"{path}: its entries overlap: they are larger than the file")
