"""Every row once an epoch, in a seeded order, resumable from one integer."""

import threading
import time

import ml_dtypes
import numpy as np
import pytest

from vsae_jax.activations import shuffle

N = 1000


def stream(seed=0, monkeypatch=None, n_rows=N):
    """Rows [i, i] of an array far larger than a block of 10 rows."""

    def read(start, stop):
        return np.arange(start, stop)[:, None].repeat(2, axis=1)

    # A row claims to be large, so that a block holds ten of them.
    row_bytes = shuffle.BLOCK_BYTES // 10
    return shuffle.ShuffledRows(read, n_rows=n_rows, row_bytes=row_bytes, seed=seed)


def test_every_row_exactly_once_an_epoch():
    rows = stream()
    for epoch in range(3):
        seen = rows.take(epoch * N, N)[:, 0]
        np.testing.assert_array_equal(np.sort(seen), np.arange(N))


def test_order_is_shuffled_and_differs_by_epoch_and_seed():
    first, second = stream().take(0, N)[:, 0], stream().take(N, N)[:, 0]
    other = stream(seed=1).take(0, N)[:, 0]
    for a, b in ((first, np.arange(N)), (first, second), (first, other)):
        assert np.mean(a == b) < 0.05
    # Blocks are mixed: neighbours in the stream are rarely neighbours on disk.
    assert np.mean(np.abs(np.diff(first)) == 1) < 0.1


@pytest.mark.parametrize("batch", [1, 7, 64, 999])
def test_any_position_gives_the_same_rows(batch):
    whole = stream().take(0, 2 * N + 500)
    resumed = stream()
    for position in range(0, 2 * N + 500 - batch, 333):
        np.testing.assert_array_equal(
            resumed.take(position, batch), whole[position : position + batch]
        )


def test_batches_run_on_across_the_end_of_an_epoch():
    rows = stream().take(N - 3, 6)[:, 0]
    last, first = stream().take(N - 3, 3)[:, 0], stream().take(N, 3)[:, 0]
    np.testing.assert_array_equal(rows, np.concatenate([last, first]))


def test_reads_are_contiguous_and_only_what_is_needed():
    reads = []

    def read(start, stop):
        reads.append((start, stop))
        return np.zeros((stop - start, 2))

    row_bytes = shuffle.BLOCK_BYTES // 10
    rows = shuffle.ShuffledRows(read, n_rows=N, row_bytes=row_bytes, seed=0)
    rows.take(0, 40)
    rows.take(40, 40)
    assert len(reads) == shuffle.BLOCKS_IN_GROUP
    assert all(stop - start == 10 for start, stop in reads)


def test_a_corpus_smaller_than_a_batch_repeats():
    rows = stream(n_rows=5).take(0, 12)[:, 0]
    np.testing.assert_array_equal(np.sort(rows[:5]), np.arange(5))
    np.testing.assert_array_equal(np.sort(rows[5:10]), np.arange(5))


def test_read_ahead_keeps_order_and_runs_ahead():
    made = []

    def items():
        for i in range(5):
            made.append(i)
            yield i

    ahead = shuffle.read_ahead(items(), depth=2)
    assert next(ahead) == 0
    deadline = time.monotonic() + 10
    while len(made) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(made) >= 3
    assert list(ahead) == [1, 2, 3, 4]


def test_read_ahead_hands_errors_over():
    def items():
        yield 1
        raise OSError("the disk is gone")

    ahead = shuffle.read_ahead(items())
    assert next(ahead) == 1
    with pytest.raises(OSError, match="the disk is gone"):
        next(ahead)


def test_closing_ends_the_thread():
    before = threading.active_count()
    ahead = shuffle.read_ahead(iter(range(10**9)))
    next(ahead)
    ahead.close()
    assert threading.active_count() == before


def prefetching(read, *, n_rows=N):
    """A stream whose thread loads ahead, in blocks of 10 rows and groups of 80."""
    row_bytes = shuffle.BLOCK_BYTES // 10
    return shuffle.ShuffledRows(
        read, n_rows=n_rows, row_bytes=row_bytes, seed=0, prefetch=True
    )


def numbered(start, stop):
    return np.arange(start, stop)[:, None].repeat(2, axis=1)


def wait_until(condition):
    deadline = time.monotonic() + 10
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert condition()


@pytest.mark.parametrize("n_rows, batch", [(N, 7), (N, 999), (83, 40), (5, 12)])
def test_prefetching_does_not_change_the_stream(n_rows, batch):
    with prefetching(numbered, n_rows=n_rows) as ahead:
        plain = stream(n_rows=n_rows)
        for position in range(0, 3 * n_rows, batch):
            np.testing.assert_array_equal(
                ahead.take(position, batch), plain.take(position, batch)
            )


def test_prefetching_follows_jumps():
    positions = np.random.default_rng(0).integers(0, 3 * N, 40)
    with prefetching(numbered) as ahead:
        for position in positions.tolist():
            np.testing.assert_array_equal(
                ahead.take(position, 30), stream().take(position, 30)
            )


def test_the_next_group_is_read_in_another_thread_while_this_one_is_used():
    readers = []

    def read(start, stop):
        readers.append(threading.current_thread())
        return numbered(start, stop)

    with prefetching(read) as rows:
        rows.take(0, 1)
        wait_until(lambda: len(readers) == 2 * shuffle.BLOCKS_IN_GROUP)
        rows.take(1, 79)
        assert len(readers) == 2 * shuffle.BLOCKS_IN_GROUP
        later = readers[shuffle.BLOCKS_IN_GROUP :]
    assert set(readers) - set(later) == {threading.current_thread()}
    assert threading.current_thread() not in later


def test_two_groups_are_the_most_in_memory():
    with prefetching(numbered) as rows:
        buffers = set()
        jumps = np.random.default_rng(0).integers(0, 3 * N, 20).tolist()
        for position in [*range(0, 3 * N, 40), *jumps]:
            rows.take(position, 40)
            buffers.add(rows.present.buffer.ctypes.data)
    assert len(buffers) <= 2


def test_taken_rows_stay_when_their_group_is_left():
    with prefetching(numbered) as rows:
        first = rows.take(0, 80)
        kept = first.copy()
        rows.take(80, 400)
    np.testing.assert_array_equal(first, kept)


def test_bfloat16_rows_come_as_they_lie():
    table = np.arange(2 * N).reshape(N, 2).astype(ml_dtypes.bfloat16)
    with prefetching(lambda start, stop: table[start:stop]) as rows:
        taken, order = rows.take(0, N), stream().take(0, N)[:, 0]
    assert taken.dtype == table.dtype
    np.testing.assert_array_equal(taken, table[order])


def test_an_error_of_the_thread_is_raised_where_its_rows_are_taken():
    def read(start, stop):
        if threading.current_thread() is not threading.main_thread():
            raise OSError("the disk is gone")
        return numbered(start, stop)

    with prefetching(read) as rows:
        np.testing.assert_array_equal(rows.take(0, 80), stream().take(0, 80))
        with pytest.raises(OSError, match="the disk is gone"):
            rows.take(80, 1)


@pytest.mark.parametrize("end", ["close", "forget"])
def test_the_thread_ends_with_the_stream(end):
    before = threading.active_count()
    rows = prefetching(numbered)
    rows.take(0, 1)
    assert threading.active_count() == before + 1
    if end == "close":
        rows.close()
        assert threading.active_count() == before
    del rows
    wait_until(lambda: threading.active_count() == before)


def test_closing_read_ahead_closes_what_it_reads():
    closed = []

    def items():
        try:
            yield from range(10**9)
        finally:
            closed.append(True)

    source = items()
    ahead = shuffle.read_ahead(source)
    next(ahead)
    ahead.close()
    assert closed
