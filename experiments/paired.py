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
        digits = 4 if abs(self.mean) < 10 else 1
        mean, low, high = (f"{value:+.{digits}f}" for value in self[:3])
        return f"{mean} [{low}, {high}]" if self.n > 1 else f"{mean} (n=1)"

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
