"""Work of many parts on all cores, in threads: for what lets go of the interpreter."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from threadpoolctl import threadpool_limits

T = TypeVar("T")


def in_threads(work: Iterable[Callable[[], T]]) -> Iterator[T]:
    """What each of `work` returns, in its order, as many at a time as there are cores.
    `work` is asked for no more than twice that, so that what its parts hold does not
    pile up; the first error ends it. Meanwhile NumPy's products take one core each:
    those of several threads would wait for each other's."""
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
