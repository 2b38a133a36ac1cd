"""Differences between arms, paired over seeds, with 95 % intervals.

Arms of one seed have the same rows, initial weights and schedule, so what differs
within a seed is the switch; what is left over seeds is noise. The interval is
Student's t for the mean of the differences, two-sided.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from scipy.stats import t as student

_LEVEL = 0.95


class Interval(NamedTuple):
    """A mean of `n` values, and the ends of its interval (NaN for a single value)."""

    mean: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        """Two digits of what the interval leaves open; four of a single value."""
        half = (self.high - self.low) / 2
        size = half if half > 0 else abs(self.mean) / 1000
        digits = min(max(1 - math.floor(math.log10(size)), 0), 6) if size > 0 else 1
        mean, low, high = (f"{value:+.{digits}f}" for value in self[:3])
        return f"{mean} [{low}, {high}]" if self.n > 1 else f"{mean} (n=1)"

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
        return Interval(mean, math.nan, math.nan, n)
    quantile = float(student.ppf((1 + _LEVEL) / 2, n - 1))
    half = quantile * statistics.stdev(values) / math.sqrt(n)
    return Interval(mean, mean - half, mean + half, n)


def holm(ps: Sequence[float]) -> list[float]:
    """Holm's step-down: the p of each, corrected for their number."""
    order = sorted(range(len(ps)), key=lambda i: ps[i])
    corrected, largest = [0.0] * len(ps), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min((len(ps) - rank) * ps[i], 1.0))
        corrected[i] = largest
    return corrected
