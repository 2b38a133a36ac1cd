"""How strongly latents fire at most: the paper's figures 8 and 9, not clipped."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vsae_jax.latents.feature_files import FiringStatistics, read_statistics
from vsae_jax.latents.map_statistics import PAPER_RANGE, alive_counts
from vsae_jax.report.figures import style
from vsae_jax.runs import series
from vsae_jax.runs.series import Arm

_BINS = 40
_ROWS = {
    "n_alive_above_0": "fire at all",
    "n_alive_above_0.0001": "rate > 0.0001",
    "n_alive_above_0.01": "rate > 0.01",
    "n_alive_above_0.1": "rate > 0.1",
    "n_max_in_paper_range": f"max in (0, {PAPER_RANGE[1]}]",
}
CAPTION = (
    "Bars: mean over seeds; whiskers: lowest to highest seed. The paper counts bars of "
    f"a histogram clipped to [0, {PAPER_RANGE[1]}]:\nthe last row of each table, which "
    "depends on the scale of x. Counts: mean ± standard deviation over seeds."
)


def max_activations(arms: Sequence[Arm]) -> Iterator[tuple[str, Figure]]:
    """One plot per series; rows are k, columns are variants."""
    found = {arm.folder: read_statistics(arm) for arm in arms}
    columns = list(series.series_of(arms, over=("seed", "k")))
    rows = list(dict.fromkeys(arm.settings["k"] for arm in arms))
    edges = _edges(list(found.values()))
    figure = style.figure(4.2 * len(columns), 3.0 * len(rows) + 0.5)
    axes = figure.subplots(
        len(rows), len(columns), squeeze=False, sharex=True, sharey=True
    )
    colours = style.colours([series.label(column) for column in columns])
    kinds = series.series_of(arms)
    for shared, members in kinds.items():
        column = tuple(s for s in shared if s[0] != "k")
        ax = axes[rows.index(members[0].settings["k"]), columns.index(column)]
        features = [found[arm.folder] for arm in members]
        colour = colours[series.label(column)]
        _histogram(ax, features, edges=edges, title=series.label(shared), c=colour)
    for ax in axes.flat:
        ax.set_visible(ax.has_data())
    # Room for the table above the bars.
    axes[0, 0].set_ylim(0.5, 40 * axes[0, 0].get_ylim()[1])
    style.caption(figure, CAPTION)
    yield "max_activations", figure


def _edges(found: Sequence[FiringStatistics]) -> np.ndarray:
    most = np.concatenate([features.max_activation for features in found])
    most = most[most > 0]
    low, high = (most.min(), most.max()) if len(most) else (0.1, 10.0)
    return np.geomspace(low / 1.01, high * 1.01, _BINS + 1)


def _histogram(
    ax: Axes,
    features: Sequence[FiringStatistics],
    *,
    edges: np.ndarray,
    title: str,
    c: Any,
) -> None:
    counts = np.stack([np.histogram(f.max_activation, edges)[0] for f in features])
    mean = counts.mean(0)
    ax.stairs(mean, edges, fill=True, color=c, alpha=0.7)
    some = np.flatnonzero(counts.max(0) > 0)
    middle = np.sqrt(edges[:-1] * edges[1:])[some]
    # A log axis has no 0: a whisker to 0 ends below the axis.
    low = np.maximum(counts.min(0)[some], 0.1)
    ax.vlines(middle, low, counts.max(0)[some], color=style.BLACK, linewidth=0.7)
    if edges[0] < PAPER_RANGE[1]:
        ax.axvspan(edges[0], PAPER_RANGE[1], color=style.GREY, alpha=0.15, linewidth=0)
    ax.set(xscale="log", yscale="log", title=title, xlim=(edges[0], edges[-1]))
    style.plain_log(ax.xaxis)
    ax.set_xlabel("maximum activation (units of the scaled input)")
    ax.set_ylabel("latents")
    numbers = [alive_counts(f.firing_rate, f.max_activation) for f in features]
    lines = [
        f"{words:<14} {series.spread([n[name] for n in numbers], digits=0):>12}"
        for name, words in _ROWS.items()
    ]
    ax.text(
        0.02,
        0.97,
        "\n".join(lines),
        transform=ax.transAxes,
        va="top",
        family="DejaVu Sans Mono",
        fontsize=7,
        bbox={"facecolor": "white", "alpha": 0.8, "edgecolor": "none"},
    )
