"""Files that are written whole or not at all, and .npy files with checksums."""

import contextlib
import hashlib
import io
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from vsae_jax.system.errors import UserError, one_line

TEMPORARY = ".tmp"
# A file is synced after this many bytes, so that its last sync is short.
_SYNC_BYTES = 2**24


class NpyWriter:
    """An .npy file of known shape, written piece by piece under a temporary name.

    Call `add` for each piece, `close` for the file's sha256 and `publish` to give it
    its name; or `abandon`.
    """

    def __init__(self, path: Path, *, shape: tuple[int, ...], dtype: Any):
        self._path, self._temporary = path, path.with_name(path.name + TEMPORARY)
        self._sha256 = hashlib.sha256()
        self._missing = _file_bytes(shape, dtype)
        self._unsynced = 0
        self._file = self._temporary.open("wb")
        self._write(_header(shape, dtype))

    def add(self, array: np.ndarray) -> None:
        """Appends the array's bytes."""
        self._write(np.ascontiguousarray(array).data.cast("B"))

    def _write(self, data: bytes | memoryview) -> None:
        self._missing -= len(data)
        self._sha256.update(data)
        with naming(self._temporary):
            self._file.write(data)
            self._unsynced += len(data)
            if self._unsynced >= _SYNC_BYTES:
                self._sync()

    def _sync(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._unsynced = 0

    def close(self) -> str:
        """Waits until the file's bytes are on the disk; returns its sha256."""
        if self._missing:
            raise ValueError(f"{self._path}: {self._missing} bytes are missing")
        with naming(self._temporary), self._file:
            self._sync()
        return self._sha256.hexdigest()

    def publish(self) -> None:
        """Gives the closed file its name."""
        self._temporary.replace(self._path)

    def abandon(self) -> None:
        """Removes the temporary file, if it is still there."""
        with contextlib.suppress(OSError):  # the disk may be full
            self._file.close()
        self._temporary.unlink(missing_ok=True)


def replace_file(path: Path, data: bytes) -> None:
    """Writes a small file; a kill or power cut leaves the old or the new one whole."""
    temporary = path.with_name(path.name + TEMPORARY)
    try:
        with naming(temporary), temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        with contextlib.suppress(OSError):  # frees its room on a full disk
            temporary.unlink()
        raise
    temporary.replace(path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Makes renames in the folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def npy_sha256(array: np.ndarray) -> str:
    """The sha256 of the .npy file that would hold `array`."""
    digest = hashlib.sha256(_header(array.shape, array.dtype))
    digest.update(np.ascontiguousarray(array).data.cast("B"))
    return digest.hexdigest()


def open_verified(
    path: Path, *, shape: tuple[int, ...], dtype: Any, sha256: str
) -> np.ndarray:
    """A read-only memory map of a file whose checksum, shape and dtype are right."""
    again = "delete it and run extract again, which writes it anew"
    try:
        size, whole = path.stat().st_size, _file_bytes(shape, dtype)
        if size < whole:
            raise UserError(f"{path} is truncated: {size} of {whole} bytes; {again}")
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        raise UserError(
            f"{path} is missing: run extract again, which writes it anew"
        ) from None
    if found != sha256:
        raise UserError(f"{path} is corrupt, its checksum is wrong; {again}")
    try:
        array = np.lib.format.open_memmap(path, mode="r")
    except ValueError as error:
        raise UserError(
            f"{path} is not an .npy file ({one_line(error)}); {again}"
        ) from None
    if array.shape != shape or array.dtype != dtype:
        raise UserError(
            f"{path} holds {array.dtype}{list(array.shape)} but the manifest says "
            f"{np.dtype(dtype)}{list(shape)}; {again}"
        )
    return array


def _header(shape: tuple[int, ...], dtype: Any) -> bytes:
    header = io.BytesIO()
    description = np.lib.format.dtype_to_descr(np.dtype(dtype))
    np.lib.format.write_array_header_1_0(
        header, {"descr": description, "fortran_order": False, "shape": shape}
    )
    return header.getvalue()


def _file_bytes(shape: tuple[int, ...], dtype: Any) -> int:
    return len(_header(shape, dtype)) + math.prod(shape) * np.dtype(dtype).itemsize


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Adds the path to an error in the block; Python leaves it out when writing."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
