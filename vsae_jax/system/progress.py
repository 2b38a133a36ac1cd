"""Progress of a long command: a bar on a terminal, otherwise a line now and then."""

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any

from tqdm import tqdm

LINE_EVERY_S = 10.0
# What is shown beside the rate: numbers, or text made from several.
Numbers = Mapping[str, float | str]
_OUT: ContextVar[Any] = ContextVar("where progress is written", default=None)


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """Within the block nothing is printed, and no progress is written."""
    with open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing):
        before = _OUT.set(nothing)
        try:
            yield
        finally:
            _OUT.reset(before)


def bar(total: int, *, unit: str, start: int = 0, stream: Any = None) -> "Bar | Lines":
    """Progress towards `total` units (a plural), of which `start` are done already.

    Use it in a `with`; `update(n)` adds n units, `show(numbers)` sets what is written
    after the rate. Writes to the text file `stream` (stderr): a bar on a terminal, else
    a line every ten seconds and one at the end. The rate counts from the first update,
    before which programs are compiled.
    """
    out = stream or _OUT.get() or sys.stderr
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
        if self._bar.n > self._bar.initial:
            self._bar.update(n)
            return
        self._bar.n += n
        self._bar.last_print_n, self._bar.last_print_t = self._bar.n, time.time()
        self._bar.refresh()

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
        self._warm: tuple[float, int] | None = None

    def update(self, n: int) -> None:
        self._done += n
        self._warm = self._warm or (self._clock(), self._done)
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
        since, before = self._warm or (self._began, self._start)
        if self._done == before:
            since, before = self._began, self._start
        seconds = self._written - since
        rate = (self._done - before) / seconds if seconds > 0 else 0.0
        left = (self._total - self._done) / rate if rate > 0 else 0.0
        parts = [
            f"{self._done:,} of {self._total:,} {self._unit}",
            f"{_short(rate)} {self._unit}/s",
            f"{tqdm.format_interval(left)} left" if left > 0 else "",
            self._numbers,
        ]
        print(", ".join(part for part in parts if part), file=self._stream, flush=True)


def forecast(
    parts: Iterable[Any],
    *,
    count: int,
    what: str,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Any]:
    """The parts, `count` of them, which should take the same time each. Once the second
    is done (the first one compiles), a line says how long all will take."""
    began = 0.0
    for i, part in enumerate(parts):
        if i == 1:
            began = clock()
        if i == 2:
            # print would write into a bar.
            tqdm.write(f"{what}: about {_about((clock() - began) * count)}")
        yield part


def _about(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 90 else f"{minutes / 60:.1f} h"


def size(n_bytes: int) -> str:
    """A number of bytes in GB or MB."""
    return f"{n_bytes / 1e9:.1f} GB" if n_bytes >= 1e8 else f"{n_bytes / 1e6:.2f} MB"


def _short(number: float) -> str:
    return tqdm.format_sizeof(number) if number >= 1000 else f"{number:.3g}"


def _numbers(numbers: Numbers) -> str:
    return ", ".join(
        f"{name} {number if isinstance(number, str) else format(number, '.4g')}"
        for name, number in numbers.items()
    )
