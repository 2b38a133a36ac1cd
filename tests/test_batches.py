"""Every row once an epoch, in a seeded order, resumable from one integer."""

import threading
import time

import numpy as np
import pytest

from vsae_jax import batches

N = 1000


def stream(seed=0, monkeypatch=None, n_rows=N):
    """Rows [i, i] of an array far larger than a block of 10 rows."""

    def read(start, stop):
        return np.arange(start, stop)[:, None].repeat(2, axis=1)

    # A row claims to be large, so that a block holds ten of them.
    row_bytes = batches._BLOCK_BYTES // 10
    return batches.ShuffledRows(read, n_rows=n_rows, row_bytes=row_bytes, seed=seed)


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

    row_bytes = batches._BLOCK_BYTES // 10
    rows = batches.ShuffledRows(read, n_rows=N, row_bytes=row_bytes, seed=0)
    rows.take(0, 40)
    rows.take(40, 40)
    assert len(reads) == batches._BLOCKS_IN_GROUP
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

    ahead = batches.read_ahead(items(), depth=2)
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

    ahead = batches.read_ahead(items())
    assert next(ahead) == 1
    with pytest.raises(OSError, match="the disk is gone"):
        next(ahead)


def test_closing_ends_the_thread():
    before = threading.active_count()
    ahead = batches.read_ahead(iter(range(10**9)))
    next(ahead)
    ahead.close()
    assert threading.active_count() == before
