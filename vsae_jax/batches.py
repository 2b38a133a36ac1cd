"""Shuffled, resumable batches from memory-mapped shards, read ahead in a thread.

An epoch is a seeded order of contiguous blocks. Groups of blocks are read one after
another and their rows permuted in memory, so every row is seen exactly once an epoch,
reads are contiguous, and memory holds two groups whatever the size of the shards.
The stream is a function of (seed, position): resuming needs one integer.
"""

import queue
import threading
from collections.abc import Callable, Generator, Iterable
from typing import Any

import numpy as np

_BLOCK_BYTES = 2**26
_BLOCKS_IN_GROUP = 8


class ShuffledRows:
    """An endless stream of rows: epoch after epoch, each in its own order.

    `read(start, stop)` gives rows `[stop - start, d_model]`; `row_bytes` sets the
    size of a block (64 MiB, eight of them mixed).
    """

    def __init__(
        self,
        read: Callable[[int, int], np.ndarray],
        *,
        n_rows: int,
        row_bytes: int,
        seed: int,
    ):
        self._read = read
        self._n_rows = n_rows
        self._seed = seed
        self._block = max(_BLOCK_BYTES // row_bytes, 1)
        self._loaded: tuple[tuple[int, int], np.ndarray] | None = None

    def take(self, position: int, count: int) -> np.ndarray:
        """Rows `position` to `position + count` of the stream, `[count, d_model]`."""
        parts = []
        while count > 0:
            rows = self._rows_from(position)[:count]
            parts.append(rows)
            position += len(rows)
            count -= len(rows)
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _rows_from(self, position: int) -> np.ndarray:
        """The rest of the group that holds `position`."""
        epoch, offset = divmod(position, self._n_rows)
        for number, blocks in enumerate(self._groups(epoch)):
            length = sum(stop - start for start, stop in blocks)
            if offset < length:
                return self._group(epoch, number, blocks)[offset:]
            offset -= length
        raise AssertionError("an epoch's groups hold all of its rows")

    def _groups(self, epoch: int) -> list[list[tuple[int, int]]]:
        starts = range(0, self._n_rows, self._block)
        blocks = [(s, min(s + self._block, self._n_rows)) for s in starts]
        order = np.random.default_rng([self._seed, epoch]).permutation(len(blocks))
        shuffled = [blocks[i] for i in order]
        return [
            shuffled[i : i + _BLOCKS_IN_GROUP]
            for i in range(0, len(shuffled), _BLOCKS_IN_GROUP)
        ]

    def _group(
        self, epoch: int, number: int, blocks: list[tuple[int, int]]
    ) -> np.ndarray:
        if self._loaded is None or self._loaded[0] != (epoch, number):
            self._loaded = None
            rows = np.concatenate([self._read(*block) for block in blocks])
            rng = np.random.default_rng([self._seed, epoch, number])
            self._loaded = (epoch, number), rows[rng.permutation(len(rows))]
        return self._loaded[1]


def read_ahead(items: Iterable[Any], *, depth: int = 2) -> Generator[Any, None, None]:
    """The same items, made in a thread up to `depth` ahead; its errors are raised
    here, and closing the iterator ends the thread."""
    ready: queue.Queue = queue.Queue(maxsize=depth)
    closed = threading.Event()

    def put(item: Any) -> None:
        while not closed.is_set():
            try:
                return ready.put(item, timeout=0.1)
            except queue.Full:
                continue

    def work() -> None:
        try:
            for item in items:
                put((item, None))
                if closed.is_set():
                    return
            put((None, StopIteration()))
        except BaseException as error:  # handed to the consumer, which raises it
            put((None, error))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while True:
            item, error = ready.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            yield item
    finally:
        closed.set()
        thread.join()
