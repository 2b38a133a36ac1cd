"""Many pieces of work in threads on all cores, where they release Python's lock."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from threadpoolctl import threadpool_limits

T = TypeVar("T")


def in_threads(work: Iterable[Callable[[], T]]) -> Iterator[T]:
    """The results of `work`, in its order, as many at a time as there are cores. At
    most twice as many are taken from `work` ahead, so that they do not fill the memory.
    The first error ends all. Meanwhile each of NumPy's products uses one core, since
    those of several threads would wait for each other."""
    cores = os.cpu_count() or 1
    pending: deque[Future[T]] = deque()
    pool = ThreadPoolExecutor(cores)
    with threadpool_limits(1):
        try:
            for each in work:
                pending.append(pool.submit(each))
                if len(pending) > 2 * cores:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)
