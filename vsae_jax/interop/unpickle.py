"""A pickle read as data: tensors, dicts, lists, tuples, strings and numbers, no more.

Python's own `pickle` looks up and calls whatever a pickle names. This interpreter knows
the opcodes that `torch.save` writes, refuses any other opcode or global by its name,
and imports and calls nothing.
"""

import math
import pickletools
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from vsae_jax.system.errors import UserError, one_line

_STORAGES = {
    "torch DoubleStorage": np.float64,
    "torch FloatStorage": np.float32,
    "torch HalfStorage": np.float16,
    "torch BFloat16Storage": ml_dtypes.bfloat16,
    "torch LongStorage": np.int64,
    "torch IntStorage": np.int32,
    "torch BoolStorage": np.bool_,
}
_CALLS = ("rebuild_tensor_v2", "rebuild_parameter")
_ORDERED_DICT = "collections OrderedDict"
_NAMES = {opcode.code: opcode.name for opcode in pickletools.opcodes}
_GLOBALS = (*_STORAGES, *(f"torch._utils _{n}" for n in _CALLS), _ORDERED_DICT)


class Storage(NamedTuple):
    """Where a tensor's numbers are, and how many."""

    key: str
    dtype: np.dtype
    numel: int


class _Global(NamedTuple):
    name: str


class _Mark:
    pass


def read_pickle(
    data: bytes,
    *,
    path: Path,
    stored: Callable[[Storage], np.ndarray],
    budget: int,
) -> Any:
    """What the pickle describes. `stored` gives a storage's numbers; all tensors may
    take `budget` bytes."""
    return _Interpreter(path, stored, budget).run(data)


def _opcodes(data: bytes) -> Iterator[tuple[str, Any]]:
    """Names and arguments of the opcodes; an unknown one's argument is not read."""
    at = 0
    while at < len(data):
        name = _NAMES.get(chr(data[at]), f"0x{data[at]:02x}")
        at += 1
        if name == "GLOBAL":
            ends = data.index(b"\n", at), data.index(b"\n", data.index(b"\n", at) + 1)
            yield name, data[at : ends[1]].decode("ascii").replace("\n", " ")
            at = ends[1] + 1
        elif name in _SIZED:
            width, kind = _SIZED[name]
            stop = at + width + int.from_bytes(data[at : at + width], "little")
            if stop > len(data):
                raise ValueError("it ends within a string or a number")
            yield name, kind(data[at + width : stop])
            at = stop
        elif name in _FIXED:
            (value,) = struct.unpack_from(_FIXED[name], data, at)
            yield name, value
            at += struct.calcsize(_FIXED[name])
        else:
            yield name, None


class _Interpreter:
    """Runs a pickle's opcodes on a stack. `budget`: bytes that its tensors may take."""

    def __init__(
        self, path: Path, stored: Callable[[Storage], np.ndarray], budget: int
    ):
        self._path, self._stored, self._budget = path, stored, budget
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def run(self, pickle: bytes) -> Any:
        """The object that the pickle describes."""
        try:
            for name, argument in _opcodes(pickle):
                if name == "STOP":
                    return self._pop()
                self._step(name, argument)
        except (LookupError, TypeError, ValueError, struct.error) as error:
            raise self._wrong(f"it is no valid pickle ({one_line(error)})") from None
        raise self._wrong("it does not end")

    def _wrong(self, what: str) -> UserError:
        return UserError(f"{self._path}: refused, nothing of it was run: {what}")

    def _step(self, name: str, argument: Any) -> None:
        stack = self._stack
        if name in _CONSTANTS:
            stack.append(_CONSTANTS[name]())
        elif name in _VALUES:
            stack.append(argument)
        elif name == "GLOBAL":
            if argument not in _GLOBALS:
                raise self._wrong(
                    f"its pickle wants {argument.replace(' ', '.')[:80]!r}"
                )
            stack.append(_Global(argument))
        elif name in _TUPLES:
            items = [self._pop() for _ in range(_TUPLES[name])]
            stack.append(tuple(reversed(items)))
        elif name in ("BINPUT", "LONG_BINPUT"):
            self._memo[argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(self._memo[argument])
        elif name in _METHODS:
            getattr(self, _METHODS[name])()
        elif name != "PROTO":
            raise self._wrong(f"its pickle has the opcode {name}")

    def _pop(self) -> Any:
        if isinstance(value := self._stack.pop(), _Mark):
            raise TypeError("a mark where a value should be")
        return value

    def _to_mark(self) -> list[Any]:
        items = []
        while not isinstance(value := self._stack.pop(), _Mark):
            items.append(value)
        return items[::-1]

    def _tuple(self) -> None:
        self._stack.append(tuple(self._to_mark()))

    def _append(self, items: list[Any] | None = None) -> None:
        items = [self._pop()] if items is None else items
        if type(self._stack[-1]) is not list:
            raise TypeError("an item for what is no list")
        self._stack[-1].extend(items)

    def _appends(self) -> None:
        self._append(self._to_mark())

    def _set_item(self, items: list[Any] | None = None) -> None:
        items = [self._pop(), self._pop()][::-1] if items is None else items
        if type(self._stack[-1]) is not dict or len(items) % 2:
            raise TypeError("an item for what is no dict")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(key, str | int):
                raise TypeError(f"a {type(key).__name__} as a dict's key")
            self._stack[-1][key] = value

    def _set_items(self) -> None:
        self._set_item(self._to_mark())

    def _build(self) -> None:
        """The `_metadata` that a state dict carries; it is dropped."""
        state = self._pop()
        if type(self._stack[-1]) is not dict or type(state) is not dict:
            raise self._wrong("its pickle builds what is no OrderedDict")

    def _persistent(self) -> None:
        kind, storage, key, _, numel = self._pop()
        dtype = _STORAGES.get(storage.name) if isinstance(storage, _Global) else None
        if kind != "storage" or dtype is None or type(numel) is not int or numel < 0:
            raise self._wrong("its pickle points at what is no storage")
        if not isinstance(key, str) or not key.isalnum():
            raise self._wrong("the key of a storage is no number")
        self._stack.append(Storage(key, np.dtype(dtype), numel))

    def _reduce(self) -> None:
        arguments, function = self._pop(), self._pop()
        name = function.name if isinstance(function, _Global) else ""
        if name == _ORDERED_DICT and arguments == ():
            self._stack.append({})
        elif name.endswith("_rebuild_parameter"):
            self._stack.append(_array(arguments[0]))
        elif name.endswith("_rebuild_tensor_v2"):
            self._stack.append(self._tensor(*arguments))
        else:
            raise self._wrong("its pickle calls what is no tensor")

    def _tensor(
        self, storage: Any, offset: Any, shape: Any, stride: Any, *_: Any
    ) -> np.ndarray:
        sizes = (offset, *shape, *stride)
        if not isinstance(storage, Storage) or len(shape) != len(stride):
            raise TypeError("a tensor without a storage")
        if len(shape) > 8 or not all(type(n) is int and 0 <= n < 2**48 for n in sizes):
            raise TypeError("a tensor whose sizes are no sizes")
        if not (numel := math.prod(shape)):
            return np.empty(shape, storage.dtype)
        last = offset + sum(s * (n - 1) for n, s in zip(shape, stride, strict=True))
        if last >= storage.numel or numel > storage.numel:
            raise self._wrong(
                f"a tensor of shape {list(shape)} in a storage of {storage.numel}"
            )
        self._budget -= storage.numel * storage.dtype.itemsize
        if self._budget < 0:
            raise self._wrong("its tensors are larger than the file")
        flat = self._stored(storage)[offset:]
        strides = [s * storage.dtype.itemsize for s in stride]
        view = np.lib.stride_tricks.as_strided(
            flat, shape, strides, subok=False, writeable=False
        )
        return np.ascontiguousarray(view).reshape(shape)


def _array(value: Any) -> np.ndarray:
    if not isinstance(value, np.ndarray):
        raise TypeError("a parameter that is no tensor")
    return value


_CONSTANTS: dict[str, Callable[[], Any]] = {
    "MARK": _Mark,
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
}
_VALUES = ("BININT BININT1 BININT2 LONG1 BINFLOAT BINUNICODE SHORT_BINUNICODE").split()
_FIXED = {
    "PROTO": "<B",
    "BININT": "<i",
    "BININT1": "<B",
    "BININT2": "<H",
    "BINFLOAT": ">d",
    "BINPUT": "<B",
    "LONG_BINPUT": "<I",
    "BINGET": "<B",
    "LONG_BINGET": "<I",
}
# How many bytes of length come first, and how the rest is read.
_SIZED: dict[str, tuple[int, Callable[[bytes], Any]]] = {
    "BINUNICODE": (4, bytes.decode),
    "SHORT_BINUNICODE": (1, bytes.decode),
    "LONG1": (1, lambda b: int.from_bytes(b, "little", signed=True)),
}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_METHODS = {
    "TUPLE": "_tuple",
    "APPEND": "_append",
    "APPENDS": "_appends",
    "SETITEM": "_set_item",
    "SETITEMS": "_set_items",
    "BUILD": "_build",
    "BINPERSID": "_persistent",
    "REDUCE": "_reduce",
}
