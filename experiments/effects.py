"""Differences between arms as a table and as a figure: one row a switch, one column a
measure."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from experiments.paired import Interval
from experiments.report import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Measure -> how a table calls it.
MEASURES = {
    "alive": "alive",
    "entropy_effective_latents": "effective",
    "explained_variance": "expl. var.",
    "ce_loss_score": "loss recovered",
    "scr": "SCR",
    "tpp": "TPP",
    "decoder_cosine": "nearest cosine",
}
# Of all others more is better.
LESS_IS_BETTER = {"decoder_cosine"}
Effects = Mapping[str, Mapping[str, Interval]]


def effects_table(effects: Effects, measures: Mapping[str, str] = MEASURES) -> Table:
    """Intervals; those that exclude 0 are bold."""
    rows = [["switch", *measures.values()]]
    for kind, by_measure in effects.items():
        rows.append([kind, *(_cell(by_measure.get(name)) for name in measures)])
    return rows


def _cell(found: Interval | None) -> str:
    if found is None:
        return "-"
    return f"**{found}**" if found.sign else str(found)


def effects_figure(
    effects: Effects, title: str, measures: Mapping[str, str] = MEASURES
) -> "Figure":
    """One axes a measure, one line a switch, its interval as a bar."""
    from vsae_jax.report.figures import style

    with style.applied():
        shown = [m for m in measures if any(m in e for e in effects.values())]
        figure = style.figure(1.2 + 1.7 * len(shown), 1.2 + 0.24 * len(effects))
        all_axes = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
        for ax, measure in zip(all_axes, shown, strict=True):
            ax.axvline(0, color=style.GREY, linewidth=0.8)
            for place, by_measure in enumerate(effects.values()):
                if found := by_measure.get(measure):
                    colour = style.VERMILLION if found.sign else style.GREY
                    ends = [found.low, found.high]
                    ax.plot(ends, [place, place], color=colour, linewidth=2)
                    ax.plot(found.mean, place, "o", color=colour, markersize=4)
            ax.set_title(measures[measure])
            ax.set_xlabel("← better" if measure in LESS_IS_BETTER else "better →")
            ax.tick_params(axis="x", labelrotation=45)
        all_axes[0].set_yticks(range(len(effects)), list(effects))
        all_axes[0].invert_yaxis()
        style.caption(
            figure,
            f"Difference {title}, paired over seeds; bars: 95 % intervals, coloured "
            "where they exclude 0.",
        )
    return figure
