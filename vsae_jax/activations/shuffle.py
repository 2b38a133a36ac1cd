"""Shuffled, resumable batches from memory-mapped shards, read ahead in a thread.

An epoch is a seeded order of contiguous blocks. Groups of blocks are read one after
another, and the rows of a group are taken in a seeded order. So every row is seen
exactly once per epoch, reads are contiguous, and memory holds one group, or two with
the next one read ahead (512 MiB each), whatever the size of the shards. The stream is a
function of (seed, position): resuming needs one integer.
"""

import bisect
import functools
import queue
import threading
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent import futures
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int, Shaped, UInt8

from vsae_jax.system.errors import UserError

BLOCK_BYTES = 2**26
BLOCKS_IN_GROUP = 8


class Part(NamedTuple):
    """The rows `start` to `stop` of every `batch` rows of a stream."""

    batch: int
    start: int
    stop: int


class ShuffledRows:
    """An endless stream of rows: epoch after epoch, each in its own order.

    Args:
      read: returns the rows start, ..., stop - 1, `[stop - start, d_model]`. They are
        copied at once, so it may return a view.
      n_rows: the rows of an epoch.
      row_bytes: decides the rows of a block (64 MiB; a group has eight blocks).
      seed: of the order.
      part: the rows of the stream that `take` returns; only those are kept. Positions
        and counts are still those of the whole stream.
      left_out: numbers of rows, ascending, which are replaced by other rows of their
        group, in turn.
      forward: every epoch has the next `n_rows` rows instead of the same ones, as one
        group, so that `read` is asked for one stretch after another.
      prefetch: whether a thread loads the next group while the present one is used.
        It ends with `close`, with the `with` block, or with the object.

    `present` is the group that is being taken from, None before the first row.
    """

    def __init__(
        self,
        read: Callable[[int, int], Shaped[np.ndarray, "rows d_model"]],
        *,
        n_rows: int,
        row_bytes: int,
        seed: int,
        part: Part | None = None,
        left_out: Sequence[int] | Int[np.ndarray, " bad"] = (),
        forward: bool = False,
        prefetch: bool = False,
    ):
        self._read = read
        self._n_rows = n_rows
        self._seed = seed
        self._part = None if part and part.stop - part.start == part.batch else part
        self._left_out = np.asarray(left_out, np.int64)
        self._block = n_rows if forward else max(BLOCK_BYTES // row_bytes, 1)
        self._forward = forward
        self.present: _Group | None = None
        self._next: tuple[_Key, futures.Future[_Group]] | None = None
        self._free: list[UInt8[np.ndarray, "rows row_bytes"]] = []
        self._loader = futures.ThreadPoolExecutor(1, "rows") if prefetch else None

    def take(self, position: int, count: int) -> Shaped[np.ndarray, "count d_model"]:
        """A copy of the rows `position` to `position + count` of the stream."""
        group, _ = self._at(position)
        taken = np.empty((count, group.rows.shape[1]), np.uint8)
        seen = filled = 0
        while seen < count:
            group, offset = self._at(position + seen)
            index = group.order[offset:][: count - seen]
            seen += len(index)
            if self._part is not None:
                index = index[index >= 0]
            into = taken[filled : filled + len(index)]
            # With mode="raise" NumPy would copy `out` first; no index is out of range.
            np.take(group.rows, index, axis=0, out=into, mode="clip")
            filled += len(index)
        return taken[:filled].view(group.dtype)

    def close(self) -> None:
        """Ends the thread once its present read is done, and frees the rows."""
        if self._loader is not None:
            self._loader.shutdown(cancel_futures=True)
        self.present = self._next = None
        self._free.clear()

    def __enter__(self) -> "ShuffledRows":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _at(self, position: int) -> tuple["_Group", int]:
        """The group that holds `position`, and where in it."""
        epoch, offset = divmod(position, self._n_rows)
        starts = self._plan(epoch).starts
        number = bisect.bisect_right(starts, offset) - 1
        key = epoch, number
        if self.present is None or self.present.key != key:
            self.present = self._enter(key)
        return self.present, offset - starts[number]

    def _enter(self, key: "_Key") -> "_Group":
        """Group `key`, which the thread may have loaded; the thread starts on the next
        one."""
        if self.present is not None:
            self._free.append(self.present.buffer)
        self.present, coming, self._next = None, self._next, None
        if coming is not None and coming[0] == key:
            group = coming[1].result()
        else:
            if coming is not None and coming[1].exception() is None:  # not needed
                self._free.append(coming[1].result().buffer)
            group = self._load(key)
        if self._loader is not None:
            following = self._after(key)
            self._next = following, self._loader.submit(self._load, following)
        return group

    def _load(self, key: "_Key") -> "_Group":
        """Reads a group's blocks one after another into a free buffer."""
        epoch, number = key
        blocks = self._plan(epoch).groups[number]
        n_rows = sum(stop - start for start, stop in blocks)
        order = np.random.default_rng([self._seed, epoch, number]).permutation(n_rows)
        order, wanted = self._own(_without(order, self._bad(blocks)), key)
        buffer, seen, filled = np.empty((0, 0), np.uint8), 0, 0
        before = epoch * self._n_rows if self._forward else 0
        for start, stop in blocks:
            rows = self._read(before + start, before + stop)
            # As bytes, since NumPy holds Python's lock while it copies bfloat16.
            raw = np.ascontiguousarray(rows).view(np.uint8)
            if not seen:
                buffer = self._buffer(raw.shape[1])
            if wanted is not None:
                raw = raw[wanted[seen : seen + len(rows)]]
            seen += len(rows)
            buffer[filled : filled + len(raw)] = raw
            filled += len(raw)
        return _Group(key, buffer, buffer[:filled], order, rows.dtype)

    def _bad(self, blocks: Sequence[tuple[int, int]]) -> Int[np.ndarray, " bad"]:
        """The places, in a group whose blocks follow one another, of rows left out."""
        places, before = [np.empty(0, np.int64)], 0
        for start, stop in blocks:
            first, last = np.searchsorted(self._left_out, (start, stop))
            places.append(self._left_out[first:last] - start + before)
            before += stop - start
        return np.concatenate(places)

    def _own(
        self, order: Int[np.ndarray, " rows"], key: "_Key"
    ) -> tuple[Int[np.ndarray, " rows"], Bool[np.ndarray, " rows"] | None]:
        """A group's order, in which rows outside our part are -1 and the others are
        numbered among themselves; and the mask of the rows in our part."""
        if self._part is None:
            return order, None
        first = key[0] * self._n_rows + self._plan(key[0]).starts[key[1]]
        place = (first + np.arange(len(order))) % self._part.batch
        ours = (place >= self._part.start) & (place < self._part.stop)
        wanted = np.zeros(len(order), bool)
        wanted[order[ours]] = True
        return np.where(ours, (np.cumsum(wanted) - 1)[order], -1), wanted

    def _buffer(self, row_bytes: int) -> UInt8[np.ndarray, "most row_bytes"]:
        """Memory for a group; reused, since fresh pages cost more than reading."""
        if self._free:
            return self._free.pop()
        most = min(BLOCKS_IN_GROUP * self._block, self._n_rows)
        if self._part is not None:
            batch, start, stop = self._part
            most = (most // batch + 2) * (stop - start)
        return np.empty((most, row_bytes), np.uint8)

    def _after(self, key: "_Key") -> "_Key":
        epoch, number = key
        last = number + 1 == len(self._plan(epoch).groups)
        return (epoch + 1, 0) if last else (epoch, number + 1)

    def _plan(self, epoch: int) -> "_Plan":
        return _plan(epoch, n_rows=self._n_rows, block=self._block, seed=self._seed)


def _without(order: np.ndarray, bad: np.ndarray) -> np.ndarray:
    """The order with the rows `bad` replaced by the others, in their order."""
    if not len(bad):
        return order
    is_bad = np.isin(order, bad)
    others = order[~is_bad]
    if not len(others):
        raise UserError("a whole group of rows is bad: nothing can take their place")
    replaced = order.copy()
    replaced[is_bad] = np.resize(others, len(bad))
    return replaced


_Key = tuple[int, int]  # epoch, and group within it


class _Group(NamedTuple):
    """Some blocks in memory. Row i of the stream is `rows[order[i]]`; where `order[i]`
    is -1, it is not in our part."""

    key: _Key
    buffer: UInt8[np.ndarray, "most row_bytes"]
    rows: UInt8[np.ndarray, "rows row_bytes"]
    order: Int[np.ndarray, " stream"]
    dtype: np.dtype


class _Plan(NamedTuple):
    """An epoch's groups of blocks (start, stop), and where in it each group starts."""

    groups: list[list[tuple[int, int]]]
    starts: list[int]


@functools.lru_cache(maxsize=8)
def _plan(epoch: int, *, n_rows: int, block: int, seed: int) -> _Plan:
    blocks = [(s, min(s + block, n_rows)) for s in range(0, n_rows, block)]
    order = np.random.default_rng([seed, epoch]).permutation(len(blocks))
    groups = [
        [blocks[i] for i in order[n : n + BLOCKS_IN_GROUP]]
        for n in range(0, len(blocks), BLOCKS_IN_GROUP)
    ]
    lengths = [sum(stop - start for start, stop in group) for group in groups]
    return _Plan(groups, [0, *np.cumsum(lengths)[:-1].tolist()])


def read_ahead(items: Iterable[Any], *, depth: int = 2) -> Generator[Any, None, None]:
    """The same items, made in a thread up to `depth` ahead; its errors are raised
    here, and closing the iterator ends the thread and closes `items`."""
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
        finally:
            if isinstance(items, Generator):
                items.close()

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
