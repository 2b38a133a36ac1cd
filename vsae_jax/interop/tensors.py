"""Tensors and JSON from strangers: bounded in size, checked by name, never executed.

A safetensors file is 8 bytes of length, a JSON header and the tensors' bytes. It is
read here rather than by its library, which does not know bfloat16 in NumPy and accepts
headers of 100 MB.
"""

import hashlib
import math
import textwrap
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from vsae_jax.autoencoder import sae
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


def file_beside(config: str, weights: str) -> Callable[[Path], Path | None]:
    """A format's `weights`: the file of that name, in a folder that has both files."""

    def found(folder: Path) -> Path | None:
        both = (folder / config).is_file() and (folder / weights).is_file()
        return folder / weights if both else None

    return found


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of at most 1 MiB."""
    return read_object(path, limit=MAX_JSON_BYTES)


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """Every tensor of the file; no two may share bytes, and no byte may be unused."""
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
    """First and last byte, dtype and shape of one tensor, which must fit together."""
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
    """Names from a stranger, in one bounded line."""
    text = ", ".join(names)[:200]
    return text if text.isprintable() else repr(text)


def check_keys(config: Mapping[str, Any], known: str, *, where: Path) -> None:
    """Refuses keys of a config that are not in `known`: they might change what is
    computed."""
    if unknown := sorted(config.keys() - set(known.split())):
        expected = textwrap.shorten(known.replace(" ", ", "), 300, placeholder=" ...")
        raise UserError(
            f"{where} has unknown keys: {listed(unknown)}; expected {expected}"
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
            f"{where} has unknown tensors: {listed(unknown)}; "
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


def our_arrays(
    arrays: Mapping[str, np.ndarray], names: Mapping[str, str], *, where: Path
) -> dict[str, np.ndarray]:
    """Our arrays in float32 from another library's, `names` saying what it calls each.
    One that it calls `.weight` is the transposed of ours. Refuses missing and unknown
    arrays, and wrong shapes."""
    axes = {ours: spec.axes for ours, spec in sae.every_array().items()}
    sizes = {
        "d_model": size_of(arrays, names["b_dec"], where=where),
        "d_sae": size_of(arrays, names["b_enc"], where=where),
    }
    layout = {
        theirs: tuple(sizes[axis] for axis in axes[ours])[:: _order(theirs)]
        for ours, theirs in names.items()
    }
    check_layout(arrays, layout, where=where)
    floats = as_float32(arrays, where=where)
    return {
        ours: floats[theirs].T.copy() if _order(theirs) < 0 else floats[theirs]
        for ours, theirs in names.items()
    }


def their_arrays(
    params: Mapping[str, np.ndarray], names: Mapping[str, str]
) -> dict[str, np.ndarray]:
    """The inverse of `our_arrays`."""
    return {
        theirs: np.ascontiguousarray(params[ours].T)
        if _order(theirs) < 0
        else params[ours]
        for ours, theirs in names.items()
    }


def _order(theirs: str) -> int:
    """-1 for a matrix that torch's Linear holds transposed, else 1."""
    return -1 if theirs.endswith(".weight") else 1


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
    """The length of a bias, which cannot be transposed by mistake."""
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
