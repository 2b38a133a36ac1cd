"""Lines over k or over the number of ablated latents: the paper's figures 3, 4, 5.

A line is the mean over seeds; the band around it goes from the lowest to the highest
seed. Each variant (or whatever else a grid varies) has a colour, each k a line style.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from vsae_jax.report.figures import style
from vsae_jax.runs import series
from vsae_jax.runs.series import Arm

Metrics = Mapping[str, float | None]
Points = dict[int, float | None]
# With a smaller divisor, a quotient of accuracy differences would be noise.
LEAST_UNINTENDED = 0.001


class Panel(NamedTuple):
    """One plot. `read(metrics, k)` returns y by x; `reference` is a metric drawn as a
    horizontal line; a `part` is left out where it equals the first panel."""

    title: str
    ylabel: str
    read: Callable[[Metrics, int], Points]
    reference: str | None = None
    log: bool = False
    part: bool = False


class Lines(NamedTuple):
    """A figure of `evals/<eval>.json`: panels side by side on the same x."""

    eval: str
    xlabel: str
    over_k: bool
    panels: tuple[Panel, ...]


def by_k(metric: str) -> Callable[[Metrics, int], Points]:
    """The metric at the arm's k."""
    return lambda metrics, k: {k: metrics.get(metric)}


def by_n(template: str) -> Callable[[Metrics, int], Points]:
    """The metrics whose names are `template` with a number at `{n}`, by that number."""
    pattern = re.compile(re.escape(template).replace(r"\{n\}", r"(\d+)"))

    def read(metrics: Metrics, k: int) -> Points:
        matches = ((pattern.fullmatch(name), value) for name, value in metrics.items())
        return {int(match[1]): value for match, value in matches if match}

    return read


def quotient_by_n(above: str, below: str) -> Callable[[Metrics, int], Points]:
    """One metric divided by another, by n; None where the divisor is hardly above
    0."""

    def read(metrics: Metrics, k: int) -> Points:
        upper, lower = by_n(above)(metrics, k), by_n(below)(metrics, k)
        return {n: _quotient(upper[n], lower.get(n)) for n in upper}

    return read


def _quotient(above: float | None, below: float | None) -> float | None:
    if above is None or below is None or below < LEAST_UNINTENDED:
        return None
    return above / below


_N = "number of ablated latents"
_ACCURACY = "test accuracy"
_INTENDED = "tpp_threshold_{n}_intended_diff_only"
_UNINTENDED = "tpp_threshold_{n}_unintended_diff_only"
_LLM = "llm_test_accuracy"
FIGURES = {
    "core": Lines(
        "core",
        "k, latents kept per token",
        True,
        (
            Panel("Loss recovered", "share of the loss", by_k("ce_loss_score")),
            Panel("Explained variance", "share", by_k("explained_variance")),
            Panel("Cosine similarity", "cosine of x and x_hat", by_k("cossim")),
            Panel("Alive latents", "share of latents that fire", by_k("frac_alive")),
        ),
    ),
    "scr": Lines(
        "scr",
        _N,
        False,
        (
            Panel("SCR", "SCR score", by_n("scr_metric_threshold_{n}")),
            Panel("Direction 1", "score", by_n("scr_dir1_threshold_{n}"), part=True),
            Panel("Direction 2", "score", by_n("scr_dir2_threshold_{n}"), part=True),
        ),
    ),
    "tpp": Lines(
        "tpp",
        _N,
        False,
        (
            Panel("TPP", "TPP score", by_n("tpp_threshold_{n}_total_metric")),
            Panel("Intended", "loss of accuracy", by_n(_INTENDED)),
            Panel("Unintended", "loss of accuracy", by_n(_UNINTENDED)),
            Panel(
                "Intended / unintended",
                "quotient",
                quotient_by_n(_INTENDED, _UNINTENDED),
                log=True,
            ),
        ),
    ),
    "sparse_probing": Lines(
        "sparse_probing",
        "k, latents kept per token",
        True,
        tuple(
            Panel(title, _ACCURACY, by_k(metric), reference=_LLM)
            for title, metric in (
                ("Probe on 1 latent", "sae_top_1_test_accuracy"),
                ("2 latents", "sae_top_2_test_accuracy"),
                ("5 latents", "sae_top_5_test_accuracy"),
                ("All latents", "sae_test_accuracy"),
            )
        ),
    ),
}


def draw(name: str, arms: Sequence[Arm]) -> Iterator[tuple[str, Figure]]:
    """The figure of that name in FIGURES."""
    lines = FIGURES[name]
    command = f"evaluate --evals={lines.eval}"
    metrics = {
        arm.folder: arm.read("evals", f"{lines.eval}.json", made_by=command)["metrics"]
        for arm in arms
    }
    panels = _different(lines.panels, arms, metrics)
    figure = style.figure(2.9 * len(panels), 3.2)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for ax, panel in zip(axes, panels, strict=True):
        _panel(ax, panel, lines, arms, metrics)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=4)
    style.caption(figure, _caption(lines, arms))
    yield name, figure


def _different(
    panels: Sequence[Panel], arms: Sequence[Arm], metrics: Mapping[Any, Metrics]
) -> list[Panel]:
    """The panels without parts that equal the first one, whose title then names them:
    an SCR score is that of one direction where all arms start out worse in it."""
    drawn = [
        [panel.read(metrics[arm.folder], arm.settings["k"]) for arm in arms]
        for panel in panels
    ]
    again = [p for p, d in zip(panels, drawn, strict=True) if p.part and d == drawn[0]]
    first = panels[0]
    for panel in again:
        title = f"{first.title} = {panel.title[0].lower()}{panel.title[1:]}"
        first = first._replace(title=title)
    return [first, *(panel for panel in panels[1:] if panel not in again)]


def _caption(lines: Lines, arms: Sequence[Arm]) -> str:
    """The caption, which says how many seeds a point is the mean of."""
    seeds = sorted({len(s) for s in series.series_of(arms).values()})
    one_k = lines.over_k and len({arm.settings["k"] for arm in arms}) == 1
    point, spread = ("Dot", "Bar") if one_k else ("Line", "Band")
    if seeds == [1]:
        return f"{point}: one seed."
    count = " or ".join(map(str, seeds))
    return f"{point}: mean of {count} seeds. {spread}: lowest to highest seed."


def _panel(
    ax: Axes,
    panel: Panel,
    lines: Lines,
    arms: Sequence[Arm],
    metrics: Mapping[Any, Metrics],
) -> None:
    over = ("seed", "k") if lines.over_k else ("seed",)
    kinds = series.series_of(arms, over=over)
    looks = style.looks(list(kinds))
    places: set[int] = set()
    for shared, members in kinds.items():
        points = gather(
            [panel.read(metrics[a.folder], a.settings["k"]) for a in members]
        )
        places |= points.keys()
        _line(ax, points, label=series.label(shared), **looks[shared])
    if panel.reference:
        every = (m.get(panel.reference) for m in metrics.values())
        levels = [level for level in every if level is not None]
        if levels:
            level, name = float(np.mean(levels)), "language model's activations"
            ax.axhline(level, color=style.GREY, linestyle="--", label=name)
    ax.set(title=panel.title, xlabel=lines.xlabel, ylabel=panel.ylabel)
    ax.set_xscale("log", base=2 if lines.over_k else 10)
    ticks = sorted(places)
    ax.set_xticks(ticks, [str(tick) for tick in ticks])
    ax.xaxis.set_minor_locator(NullLocator())
    if panel.log:
        ax.set_yscale("log")
        style.plain_log(ax.yaxis)


def gather(points: Sequence[Points]) -> dict[int, list[float]]:
    """The values of all seeds by x, sorted by x; missing values are left out."""
    places = sorted({x for each in points for x in each})
    gathered = {
        x: [y for each in points if (y := each.get(x)) is not None] for x in places
    }
    return {x: values for x, values in gathered.items() if values}


def _line(ax: Axes, points: dict[int, list[float]], **look: Any) -> None:
    x = list(points)
    (line,) = ax.plot(x, [float(np.mean(v)) for v in points.values()], **look)
    low, high = ([f(v) for v in points.values()] for f in (min, max))
    if len(x) == 1:
        ax.vlines(x, low, high, color=line.get_color(), linewidth=1)
        return
    ax.fill_between(x, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
