"""Tensors and JSON from strangers: bounded, checked by name, never executed.

A safetensors file is 8 bytes of length, a JSON header and the tensors' bytes. It is
read here rather than by its library because that one does not know bfloat16 in NumPy,
and admits headers of 100 MB.
"""

import hashlib
import math
import textwrap
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from vsae_jax.system.errors import UserError
from vsae_jax.system.strict_json import parse_object, read_object

MAX_JSON_BYTES = 2**20
DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
}
_FLOATS = {DTYPES[name] for name in ("F64", "F32", "F16", "BF16")}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of at most 1 MiB."""
    return read_object(path, limit=MAX_JSON_BYTES)


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """Every tensor of the file, each of its own stretch of bytes."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_JSON_BYTES):
            raise UserError(
                f"{path} is no safetensors file: it has {size} bytes and says that its "
                f"header has {length}, where at most {MAX_JSON_BYTES} are read"
            )
        header = parse_object(file.read(length), path)
    header.pop("__metadata__", None)
    stretches = [(*_stretch(path, n, e), n) for n, e in header.items()]
    end, arrays = 0, {}
    for start, stop, dtype, shape, name in sorted(stretches, key=lambda s: s[:2]):
        if start != end:
            raise UserError(
                f"{path}: {name} starts at byte {start} of the data, where the tensor "
                f"before it ends at {end}: tensors overlap or leave a hole"
            )
        if 8 + length + stop > size:
            raise UserError(
                f"{path} is truncated: {name} ends at byte {8 + length + stop} of a "
                f"file of {size}"
            )
        array = np.fromfile(
            path, dtype, count=math.prod(shape), offset=8 + length + start
        )
        arrays[name], end = array.reshape(shape), stop
    if 8 + length + end != size:
        raise UserError(f"{path} has {size - 8 - length - end} bytes of no tensor")
    return arrays


def _stretch(path: Path, name: str, entry: Any) -> tuple[int, int, np.dtype, tuple]:
    """First and last byte, dtype and shape of one tensor, checked on their own."""
    entry = entry if isinstance(entry, dict) else {}
    if not name.isprintable() or len(name) > 200:
        raise UserError(f"{path}: a tensor is named {name[:40]!r}")
    dtype, shape = DTYPES.get(str(entry.get("dtype"))), entry.get("shape")
    offsets = entry.get("data_offsets")
    if dtype is None:
        raise UserError(
            f"{path}: {name} has dtype {str(entry.get('dtype'))[:20]!r}; expected one "
            f"of {', '.join(DTYPES)}"
        )
    if not _whole_numbers(shape) or not _whole_numbers(offsets) or len(offsets) != 2:
        raise UserError(f"{path}: the shape or data_offsets of {name} are no sizes")
    start, stop = offsets
    if stop - start != math.prod(shape) * dtype.itemsize:
        raise UserError(
            f"{path}: {name} of shape {shape} has {stop - start} bytes; expected "
            f"{math.prod(shape) * dtype.itemsize}"
        )
    return start, stop, dtype, tuple(shape)


def _whole_numbers(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) <= 8
        and all(type(n) is int and 0 <= n < 2**48 for n in value)
    )


def listed(names: Iterable[str]) -> str:
    """Names from a stranger, in one line."""
    text = ", ".join(names)[:200]
    return text if text.isprintable() else repr(text)


def check_keys(config: Mapping[str, Any], known: str, *, where: Path) -> None:
    """Refuses what a config says besides the names in `known`: it might change what is
    computed."""
    if unknown := sorted(config.keys() - set(known.split())):
        expected = textwrap.shorten(known.replace(" ", ", "), 300, placeholder=" ...")
        raise UserError(
            f"{where} has what is not known: {listed(unknown)}; expected {expected}"
        )


def check_layout(
    arrays: Mapping[str, np.ndarray],
    layout: Mapping[str, tuple[int, ...]],
    *,
    where: Path,
) -> None:
    """Refuses unknown and missing names and wrong shapes, saying what was expected."""
    if unknown := sorted(arrays.keys() - layout.keys()):
        raise UserError(
            f"{where} has tensors that are not known: {listed(unknown)}; "
            f"expected {', '.join(layout)}"
        )
    if missing := sorted(layout.keys() - arrays.keys()):
        raise UserError(f"{where} lacks {', '.join(missing)}")
    for name, shape in layout.items():
        found = arrays[name].shape
        if found != shape:
            swapped = found == shape[::-1]
            hint = "; it is transposed" if swapped else ""
            raise UserError(
                f"{where}: {name} has shape {list(found)}, expected {list(shape)}{hint}"
            )


def as_float32(arrays: Mapping[str, np.ndarray], *, where: Path) -> dict[str, Any]:
    """Weights in float32, all finite; float16 and bfloat16 are widened exactly."""
    floats = {}
    for name, array in arrays.items():
        if array.dtype not in _FLOATS:
            raise UserError(f"{where}: {name} is of {array.dtype}, expected floats")
        with np.errstate(over="ignore"):
            floats[name] = np.array(array, np.float32, order="C")
        if not np.isfinite(floats[name]).all():
            raise UserError(f"{where}: {name} holds NaN or infinity")
    return floats


def size_of(arrays: Mapping[str, np.ndarray], name: str, *, where: Path) -> int:
    """The length of a bias, which no transposition can change."""
    if name not in arrays:
        raise UserError(f"{where} lacks {name}; it has {listed(arrays)}")
    if arrays[name].ndim != 1 or not arrays[name].size:
        shape = list(arrays[name].shape)
        raise UserError(f"{where}: {name} has shape {shape}, expected one dimension")
    return arrays[name].size


def source_dtype(arrays: Mapping[str, np.ndarray]) -> str:
    """The widest float that the weights were stored in."""
    floats = [a.dtype for a in arrays.values() if a.dtype in _FLOATS]
    return str(max(floats, key=lambda dtype: dtype.itemsize)) if floats else "float32"


def sha256(path: Path) -> str:
    """The file's checksum."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
