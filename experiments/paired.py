"""Differences between arms, paired over seeds, with 95 % intervals.

Arms of one seed have the same rows, initial weights and schedule, so what differs
within a seed is the switch; what is left over seeds is noise. The interval is
Student's t for the mean of the differences, two-sided. Where evaluations had several
probe seeds, the differences are those of the means over them.
"""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from scipy.stats import t as student

_LEVEL = 0.95


class Interval(NamedTuple):
    """A mean of `n` values, and the ends of its interval (NaN for a single value); the
    values, and their standard deviation over probe seeds, where there are several."""

    mean: float
    low: float
    high: float
    n: int
    values: tuple[float, ...] = ()
    probe_sd: float | None = None

    def __str__(self) -> str:
        """Two digits of what the interval leaves open; four of a single value."""
        half = (self.high - self.low) / 2
        size = half if half > 0 else abs(self.mean) / 1000
        digits = min(max(1 - math.floor(math.log10(size)), 0), 6) if size > 0 else 1
        mean, low, high = (f"{value:+.{digits}f}" for value in self[:3])
        return f"{mean} [{low}, {high}]" if self.n > 1 else f"{mean} (n=1)"

    @property
    def noise(self) -> str:
        """The standard deviation over training seeds and that over the probe seeds of
        one training seed; "" where there are not several of both."""
        if self.probe_sd is None or self.n < 2:
            return ""
        return f"{statistics.stdev(self.values):.2g} / {self.probe_sd:.2g}"

    @property
    def p(self) -> float:
        """Two-sided, of Student's t, for a mean of 0; NaN for a single value."""
        half = (self.high - self.low) / 2
        if self.n < 2 or math.isnan(half):
            return math.nan
        if half == 0:
            return 0.0 if self.mean else 1.0
        quantile = float(student.ppf((1 + _LEVEL) / 2, self.n - 1))
        return float(2 * student.sf(abs(self.mean) * quantile / half, self.n - 1))

    @property
    def sign(self) -> int:
        """1 or -1 where the interval excludes 0; else 0. Seeds that agree to the last
        digit, as a few accuracies may, show nothing."""
        return ((self.low > 0) - (self.high < 0)) * (self.low < self.high)


def difference(a: Mapping[int, float], b: Mapping[int, float]) -> Interval:
    """a - b over the seeds that both have."""
    return interval([a[seed] - b[seed] for seed in a if seed in b])


def interval(values: Sequence[float]) -> Interval:
    """The mean of values with its interval; at least one."""
    n, mean = len(values), statistics.fmean(values)
    if n == 1:
        return Interval(mean, math.nan, math.nan, n, tuple(values))
    quantile = float(student.ppf((1 + _LEVEL) / 2, n - 1))
    half = quantile * statistics.stdev(values) / math.sqrt(n)
    return Interval(mean, mean - half, mean + half, n, tuple(values))


def over_probes(
    of: Callable[[int | None], Interval], probes: Sequence[int]
) -> Interval:
    """`of(None)`, which is that of the means over probe seeds, with the standard
    deviation of `of(probe)` over them: the root of the mean variance within a training
    seed. There is none of fewer than two probes, or where one lacks a training seed."""
    found = of(None)
    each = [of(probe).values for probe in probes]
    if len(each) < 2 or any(len(values) != found.n for values in each):
        return found
    variances = map(statistics.variance, zip(*each, strict=True))
    return found._replace(probe_sd=math.sqrt(statistics.fmean(variances)))


def holm(ps: Sequence[float]) -> list[float]:
    """Holm's step-down: the p of each, corrected for their number; one that is unknown
    (NaN) stays so, and does not count."""
    order = sorted(
        (i for i, p in enumerate(ps) if not math.isnan(p)), key=lambda i: ps[i]
    )
    corrected, largest = [math.nan] * len(ps), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min((len(order) - rank) * ps[i], 1.0))
        corrected[i] = largest
    return corrected
