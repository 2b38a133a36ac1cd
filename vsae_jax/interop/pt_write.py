"""Writes a dict of arrays, strings and numbers as `torch.save` would, without torch."""

import io
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from vsae_jax.system.files import replace_file

_STORAGES = {
    np.dtype(np.float32): "FloatStorage",
    np.dtype(np.int64): "LongStorage",
    np.dtype(np.int32): "IntStorage",
}
# The earliest that a zip can hold: equal arrays give equal bytes.
_EPOCH = (1980, 1, 1, 0, 0, 0)


def write_pt(path: Path, value: dict[str, Any]) -> None:
    """A file that `torch.load(path, weights_only=True)` reads back as `value`."""
    arrays: list[np.ndarray] = []

    def pointer(array: np.ndarray) -> bytes:
        arrays.append(array)
        return _tensor(array, key=str(len(arrays) - 1))

    pickle = b"\x80\x02" + _encode(value, pointer) + b"."
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        entries = {"data.pkl": pickle, "byteorder": b"little", "version": b"3\n"}
        data = {f"data/{i}": a.tobytes() for i, a in enumerate(arrays)}
        for name, content in {**entries, **data}.items():
            archive.writestr(zipfile.ZipInfo(f"archive/{name}", _EPOCH), content)
    replace_file(path, file.getvalue())


def _encode(value: Any, pointer: Callable[[np.ndarray], bytes]) -> bytes:
    """Pickle opcodes, protocol 2, that push `value`."""
    if isinstance(value, dict):
        items = (_encode(x, pointer) for pair in value.items() for x in pair)
        return b"}(" + b"".join(items) + b"u"
    if isinstance(value, str):
        text = value.encode()
        return b"X" + struct.pack("<I", len(text)) + text
    if isinstance(value, int):
        return b"\x8a\x08" + struct.pack("<q", value)
    return pointer(value)


def _tensor(array: np.ndarray, *, key: str) -> bytes:
    """torch._utils._rebuild_tensor_v2(storage, 0, shape, stride, False, {})."""
    kind = f"ctorch\n{_STORAGES[array.dtype]}\n".encode()
    texts = [_encode(text, _no_array) for text in ("storage", key, "cpu")]
    numel = _encode(array.size, _no_array)
    storage = b"(" + texts[0] + kind + texts[1] + texts[2] + numel + b"tQ"
    strides = [step // array.itemsize for step in array.strides]
    shape, stride = (
        b"(" + b"".join(_encode(n, _no_array) for n in sizes) + b"t"
        for sizes in (array.shape, strides)
    )
    zero, hooks = _encode(0, _no_array), b"ccollections\nOrderedDict\n)R"
    arguments = b"(" + storage + zero + shape + stride + b"\x89" + hooks + b"t"
    return b"ctorch._utils\n_rebuild_tensor_v2\n" + arguments + b"R"


def _no_array(array: np.ndarray) -> bytes:
    raise TypeError(f"{type(array).__name__} inside a tensor's description")
