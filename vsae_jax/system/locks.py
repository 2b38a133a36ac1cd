"""One process at a time in a folder.

The kernel releases a lock when the process that holds it ends, however that happens. So
a `.lock` file that can be locked was left behind by a process that was killed: a note
says so, and it is taken over. The file says who holds it.
"""

import contextlib
import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from vsae_jax.system import processes
from vsae_jax.system.errors import UserError

LOCK = ".lock"
_LIMIT = 200


@contextlib.contextmanager
def held(folder: Path, *, doing: str) -> Iterator[None]:
    """Makes the folder if need be and locks it; refuses one that another process holds.

    A folder that is still empty afterwards is removed again. Where there are no locks
    (on some network file systems), a note says so. In a job of several processes, the
    first holds the lock for all.
    """
    if not processes.first():
        yield
        return
    made = [p for p in (folder, *folder.parents) if not p.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = _taken(folder, doing)
    try:
        yield
    finally:
        if descriptor is not None:
            # Removed while it is held; `_is_at` keeps others from locking the old file.
            (folder / LOCK).unlink(missing_ok=True)
            os.close(descriptor)
        with contextlib.suppress(OSError):
            for path in made:
                path.rmdir()


def _taken(folder: Path, doing: str) -> int | None:
    """The descriptor of the locked file; None where nothing can be locked."""
    path = folder / LOCK
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except PermissionError:
            return None  # writing there will raise the error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _said(descriptor)
            os.close(descriptor)
            raise UserError(
                f"{folder} is being written by {holder or 'another process'}; wait for "
                "it, or give another --out"
            ) from None
        except OSError:
            os.close(descriptor)
            print(
                f"note: {folder} is on a file system without locks; nothing keeps "
                "another process from writing there"
            )
            return None
        if _is_at(path, descriptor):
            break
        os.close(descriptor)
    if gone := _said(descriptor):
        print(f"note: {gone} was writing {folder} and is gone; going on from there")
    os.ftruncate(descriptor, 0)
    who = f"{doing}, process {os.getpid()} on {socket.gethostname()}\n"
    with contextlib.suppress(OSError):  # a full disk keeps the name from being written
        os.pwrite(descriptor, who.encode(), 0)
    return descriptor


def _is_at(path: Path, descriptor: int) -> bool:
    """Whether the locked file still has that name."""
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _said(descriptor: int) -> str:
    """The holder that the file names, in one bounded line."""
    text = os.pread(descriptor, _LIMIT, 0).decode(errors="replace")
    return "".join(c if c.isprintable() else " " for c in text).strip()
