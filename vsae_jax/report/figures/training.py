"""Training curves: loss, explained variance and dead latents over the steps."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure

from vsae_jax import runs
from vsae_jax.report.figures import style
from vsae_jax.report.figures.lines import gather
from vsae_jax.runs import series
from vsae_jax.runs.series import Arm

History = Mapping[str, Any]


class Panel(NamedTuple):
    """One plot, of a column of the history."""

    column: str
    title: str
    ylabel: str
    log: bool = False


PANELS = (
    Panel("loss", "Loss", "loss", log=True),
    Panel("explained_variance", "Explained variance", "share"),
    Panel("dead_fraction", "Dead latents", "share of latents"),
)


def draw(arms: Sequence[Arm]) -> Iterator[tuple[str, Figure]]:
    """The figure `training`, from the arms' metrics.jsonl."""
    history = {
        arm.folder: runs.read_history(arm.path(runs.METRICS, made_by="train"))
        for arm in arms
    }
    by_series = series.series_of(arms)
    looks = style.looks(list(by_series))
    curves = [
        ([history[a.folder] for a in members], series.label(shared), looks[shared])
        for shared, members in by_series.items()
    ]
    yield "training", curves_of(curves)


def curves_of(
    curves: Sequence[tuple[Sequence[History], str, Mapping[str, Any]]],
) -> Figure:
    """A row of panels. A curve has histories (one for each seed), a label, a look."""
    figure = style.figure(2.9 * len(PANELS), 3.2)
    for ax, panel in zip(figure.subplots(1, len(PANELS)), PANELS, strict=True):
        for histories, label, look in curves:
            points = gather(
                [dict(zip(h["step"], h[panel.column], strict=True)) for h in histories]
            )
            x, values = list(points), list(points.values())
            look = {**look, "marker": "" if len(x) > 1 else "o"}
            mean = [float(np.mean(v)) for v in values]
            (line,) = ax.plot(x, mean, label=label, **look)
            low, high = ([f(v) for v in values] for f in (min, max))
            colour = line.get_color()
            ax.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)
        ax.set(title=panel.title, xlabel="step", ylabel=panel.ylabel)
        if panel.log:
            ax.set_yscale("log")
            style.plain_log(ax.yaxis)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    if any(labels):
        figure.legend(handles, labels, loc="outside upper center", ncols=4)
    seeds = max(len(histories) for histories, *_ in curves)
    if seeds > 1:
        style.caption(figure, "Line: mean of the seeds. Band: lowest to highest seed.")
    return figure
