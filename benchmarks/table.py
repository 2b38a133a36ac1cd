"""Medians of same-round ratios, and the table they are read from."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

BASELINE = "dictionary_learning float32"


class Spread(NamedTuple):
    """The median, and the quartiles around it."""

    median: float
    low: float
    high: float

    def text(self, digits: int = 2) -> str:
        """`4.95 (4.80 to 5.10)`."""
        median, low, high = (f"{value:.{digits}f}" for value in self)
        return f"{median} ({low} to {high})"


class Timed(NamedTuple):
    """One implementation in one mode: milliseconds a step in each round, and the rest
    of its row. `first_seconds` is the first call, which compiles."""

    implementation: str
    mode: str
    ms: Sequence[float]
    peak_bytes: int
    first_seconds: float
    is_peer: bool

    @property
    def label(self) -> str:
        return f"{self.implementation} {self.mode}"


def spread(values: Iterable[float]) -> Spread:
    """Median and quartiles."""
    values = sorted(values)
    if len(values) < 2:
        return Spread(values[0], values[0], values[0])
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(median, low, high)


def times_faster(this: Timed, than: Timed) -> Spread:
    """than's time / this time, round by round."""
    return spread(b / a for a, b in zip(this.ms, than.ms, strict=True))


def fastest_peer(timed: Sequence[Timed]) -> Timed | None:
    """The TopK peer and mode with the least median time."""
    peers = [t for t in timed if t.is_peer and "vsae_topk" not in t.implementation]
    return min(peers, key=lambda t: statistics.median(t.ms), default=None)


def rows(
    timed: Sequence[Timed], *, batch: int, floor_ms: Mapping[str, float]
) -> list[dict[str, Any]]:
    """One row for each implementation and mode; a cell is None where nothing is there
    to compare with. `floor_ms` is the dense products' time in each mode."""
    baseline = next((t for t in timed if t.label == BASELINE), None)
    fastest = fastest_peer(timed)
    return [
        {
            "implementation": t.implementation,
            "mode": t.mode,
            "ms a step": (ms := spread(t.ms)),
            "activations/s": 1e3 * batch / ms.median,
            f"times {BASELINE}": times_faster(t, baseline) if baseline else None,
            "times the fastest peer": times_faster(t, fastest) if fastest else None,
            "of the matmul floor": floor_ms[t.mode] / ms.median,
            "peak GB": t.peak_bytes / 1e9,
            "first call s": t.first_seconds,
        }
        for t in timed
    ]


def comparisons(timed: Sequence[Timed]) -> list[str]:
    """What the goals are about, one line each, as far as it was measured."""
    by_label = {t.label: t for t in timed}
    fastest = fastest_peer(timed)
    pairs = [
        ("vsae_jax_topk bfloat16", BASELINE),
        ("vsae_jax_topk bfloat16", fastest.label if fastest else ""),
        ("vsae_jax_vsae_topk bfloat16", "authors_vsae_topk bfloat16"),
        ("vsae_jax_vsae_topk bfloat16", "vsae_jax_topk bfloat16"),
        *(
            (f"vsae_jax_native_{variant} {mode}", f"vsae_jax_{variant} {mode}")
            for variant in ("topk", "vsae_topk")
            for mode in ("float32", "bfloat16")
        ),
        ("vsae_jax_native_vsae_topk bfloat16", "vsae_jax_native_topk bfloat16"),
    ]
    return [
        f"{this} is {times_faster(by_label[this], by_label[than]).text()} times as "
        f"fast as {than}"
        for this, than in pairs
        if this in by_label and than in by_label
    ]


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as a Markdown table."""
    lines = [list(rows[0]), ["---"] * len(rows[0])]
    lines += [[_cell(name, value) for name, value in row.items()] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(name: str, value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, Spread):
        return value.text(1 if name.startswith("ms") else 2)
    if isinstance(value, float):
        return (
            f"{100 * value:.0f} %"
            if name.startswith("of ")
            else f"{value:,.{_digits(value)}f}"
        )
    return str(value)


def _digits(value: float) -> int:
    return 0 if value >= 100 else 2
