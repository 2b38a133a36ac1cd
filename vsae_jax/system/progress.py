"""Progress of a long command: a bar on a terminal, otherwise a line now and then."""

import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from tqdm import tqdm

LINE_EVERY_S = 10.0
# What is shown beside the rate: numbers, or words made of several.
Numbers = Mapping[str, float | str]


def bar(total: int, *, unit: str, start: int = 0, stream: Any = None) -> "Bar | Lines":
    """Progress towards `total` units (a plural), of which `start` are done already.

    Use it in a `with`; `update(n)` adds n units, `show(numbers)` sets what is written
    after the rate. Writes to the text file `stream` (stderr): a bar if that is a
    terminal, else one line every ten seconds and one at the end.
    """
    out = sys.stderr if stream is None else stream
    kind = Bar if out.isatty() else Lines
    return kind(total, unit=unit, start=start, stream=out)


class Bar:
    """A tqdm bar."""

    def __init__(self, total: int, *, unit: str, start: int, stream: Any):
        self._bar = tqdm(
            total=total,
            initial=start,
            unit=f" {unit}",
            unit_scale=True,
            dynamic_ncols=True,
            file=stream,
        )

    def update(self, n: int) -> None:
        self._bar.update(n)

    def show(self, numbers: Numbers) -> None:
        self._bar.set_postfix_str(_numbers(numbers), refresh=False)

    def __enter__(self) -> "Bar":
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()


class Lines:
    """The same in plain lines, for a log file."""

    def __init__(
        self,
        total: int,
        *,
        unit: str,
        start: int,
        stream: Any,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._total, self._start, self._unit = total, start, unit
        self._stream, self._clock = stream, clock
        self._done, self._numbers = start, ""
        self._began = self._written = clock()

    def update(self, n: int) -> None:
        self._done += n
        if self._clock() - self._written >= LINE_EVERY_S:
            self._write()

    def show(self, numbers: Numbers) -> None:
        self._numbers = _numbers(numbers)

    def __enter__(self) -> "Lines":
        return self

    def __exit__(self, *error: object) -> None:
        self._write()

    def _write(self) -> None:
        self._written = self._clock()
        seconds = self._written - self._began
        rate = (self._done - self._start) / seconds if seconds > 0 else 0.0
        left = (self._total - self._done) / rate if rate > 0 else 0.0
        parts = [
            f"{self._done:,} of {self._total:,} {self._unit}",
            f"{_short(rate)} {self._unit}/s",
            f"{tqdm.format_interval(left)} left" if left > 0 else "",
            self._numbers,
        ]
        print(", ".join(part for part in parts if part), file=self._stream, flush=True)


def size(n_bytes: int) -> str:
    """Bytes as one reads them."""
    return f"{n_bytes / 1e9:.1f} GB" if n_bytes >= 1e8 else f"{n_bytes / 1e6:.2f} MB"


def _short(number: float) -> str:
    return tqdm.format_sizeof(number) if number >= 1000 else f"{number:.3g}"


def _numbers(numbers: Numbers) -> str:
    return ", ".join(
        f"{name} {number if isinstance(number, str) else format(number, '.4g')}"
        for name, number in numbers.items()
    )
