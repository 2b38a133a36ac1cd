"""`.npz` files from strangers: plain arrays of floats, nothing evaluated.

A `.npz` is a zip of `.npy` files, each a short header and an array's bytes. NumPy
parses the header as a Python literal; here it has to be exactly what NumPy writes. So
no pickle is read, and no array is larger than the bytes that it has.
"""

import math
import re
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np

from vsae_jax.system.errors import UserError, one_line

_MAX_ENTRIES, _MAX_HEADER = 64, 2**12
# Weights hardly compress; a file of zeros shrinks a thousand times.
_MOST_TIMES = 4
_LENGTHS = {b"\x01\x00": "<H", b"\x02\x00": "<I", b"\x03\x00": "<I"}
_HEADER = re.compile(
    r"\{'descr': '([<|]\w{2})', 'fortran_order': (True|False), "
    r"'shape': \(((?:\d{1,15}, )*(?:\d{1,15},?)?)\), \} *\n"
)
_DTYPES = {np.dtype(name).str: np.dtype(name) for name in ("f8", "f4", "f2")}
_NO_ZIP = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, OSError)


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """Every array of the file, by its name without `.npy`."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            _check_entries(entries, path)
            return {
                info.filename.removesuffix(".npy"): _read(archive, info, path)
                for info in entries
            }
    except (*_NO_ZIP, struct.error, ValueError) as error:
        raise UserError(f"{path} is not a .npz file: {one_line(error)}") from None


def _check_entries(entries: list[zipfile.ZipInfo], path: Path) -> None:
    names = [info.filename for info in entries]
    if len(names) > _MAX_ENTRIES or len(set(names)) != len(names):
        raise UserError(f"{path} has over {_MAX_ENTRIES} arrays, or one twice")
    for name in names:
        if not re.fullmatch(r"\w{1,100}\.npy", name, re.ASCII):
            raise UserError(f"{path} has an entry named {name[:80]!r}; expected .npy")
    if any(info.flag_bits & 1 for info in entries):
        raise UserError(f"{path} is encrypted")
    size, stored = sum(info.file_size for info in entries), path.stat().st_size
    if size > _MOST_TIMES * stored:
        raise UserError(
            f"{path}: its arrays say that they have {size} bytes, over {_MOST_TIMES} "
            f"times the {stored} of the file"
        )


def _read(archive: zipfile.ZipFile, info: zipfile.ZipInfo, path: Path) -> np.ndarray:
    where = f"{path}: {info.filename}"
    with archive.open(info) as file:
        magic, version = file.read(6), file.read(2)
        if magic != b"\x93NUMPY" or version not in _LENGTHS:
            raise UserError(f"{where} is not an array of NumPy's")
        form = _LENGTHS[version]
        (length,) = struct.unpack(form, file.read(struct.calcsize(form)))
        header = file.read(min(length, _MAX_HEADER)).decode("latin-1")
        found = _HEADER.fullmatch(header)
        if not found or found[1] not in _DTYPES:
            raise UserError(
                f"{where} is not a plain array of {', '.join(_DTYPES)}: {header[:60]!r}"
            )
        dtype = _DTYPES[found[1]]
        shape = tuple(int(n) for n in found[3].replace(",", " ").split())
        size = math.prod(shape) * dtype.itemsize
        if file.tell() + size != info.file_size:
            raise UserError(
                f"{where} of shape {list(shape)} needs {size} bytes and has "
                f"{info.file_size - file.tell()}"
            )
        data = file.read()
    flat = np.frombuffer(data, dtype, count=math.prod(shape))
    return flat.reshape(shape, order="F" if found[2] == "True" else "C")
