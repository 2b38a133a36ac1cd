"""SIGTERM and Ctrl-C are noted rather than raised, so that work can be saved first."""

import contextlib
import signal
import threading
from collections.abc import Iterator


class Caught:
    """`signal` is the number of the first signal that came, or 0."""

    def __init__(self) -> None:
        self.signal = 0

    def note(self, number: int, frame: object) -> None:
        """The handler; a second Ctrl-C raises KeyboardInterrupt at once."""
        if self.signal and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = self.signal or number


@contextlib.contextmanager
def caught() -> Iterator[Caught]:
    """Notes SIGTERM and SIGINT in the block; does nothing outside the main thread."""
    seen = Caught()
    if threading.current_thread() is not threading.main_thread():
        yield seen
        return
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.signal(number, seen.note) for number in numbers}
    try:
        yield seen
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
