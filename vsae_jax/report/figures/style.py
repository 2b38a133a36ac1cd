"""The style of all figures, and how they are written.

Colours are Okabe and Ito's, which people with any colour vision can tell apart; numbers
are mapped with viridis. The same data give the same bytes.
"""

import textwrap
from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import cache
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib import font_manager
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from vsae_jax.runs.series import label
from vsae_jax.system.files import replace_file

BLUE, VERMILLION, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
ORANGE, SKY, YELLOW, BLACK, GREY = "#E69F00", "#56B4E9", "#F0E442", "#000000", "#777777"
PALETTE = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY, BLACK, YELLOW)
VARIANTS = {"topk": BLUE, "vsae_topk": VERMILLION, "relu": GREEN, "vsae": PURPLE}
# Of a caption.
_LETTERS_AN_INCH = 17
# Ten colours that differ on white; none so dark that a number on it is unreadable.
CLUSTERS = (BLUE, ORANGE, GREEN, PURPLE, SKY, VERMILLION) + (
    "#8f8a00",
    "#7b61c9",
    "#a6761d",
    "#666f7a",
)
LINES, MARKERS = ("-", "--", ":", "-."), ("o", "s", "^", "D")
DPI = 100
# A log axis that spans more than this factor has labels at powers of ten only.
_LONG_LOG = 100.0

_RC: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9.0,
    "axes.titlesize": 10.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.6,
    "lines.markersize": 4.0,
    "legend.frameon": False,
    "image.cmap": "viridis",
    "figure.dpi": DPI,
    "savefig.dpi": DPI,
    "svg.fonttype": "none",
    "svg.hashsalt": "vsae_jax",
}


def applied() -> AbstractContextManager[None]:
    """The style for figures that are made and saved within the block."""
    return matplotlib.rc_context({**matplotlib.rcParamsDefault, **_RC})


def figure(width: float, height: float) -> Figure:
    """An empty figure, sized in inches, that makes room for its labels."""
    return Figure(figsize=(width, height), layout="constrained")


def caption(figure: Figure, text: str) -> None:
    """Lines below the figure, as wide as it: how to read it."""
    width = int(_LETTERS_AN_INCH * figure.get_figwidth())
    figure.supxlabel(textwrap.fill(text, width), fontsize=8, color=GREY)


def title(figure: Figure, text: str) -> None:
    """Adds a line above the figure, after its title. Where there is a legend above the
    plots, it becomes the legend's title: constrained layout would let both overlap."""
    if figure.legends:
        figure.legends[0].set_title(text)
    else:
        own = figure.get_suptitle()
        figure.suptitle(f"{own} ({text})" if own else text)


def colours(labels: Sequence[str]) -> dict[str, str]:
    """A colour for each label; a variant's name alone always has the same one."""
    if set(labels) <= VARIANTS.keys():
        return {name: VARIANTS[name] for name in labels}
    return {name: PALETTE[i % len(PALETTE)] for i, name in enumerate(labels)}


def looks(
    series: Sequence[tuple[tuple[str, Any], ...]],
) -> dict[tuple[tuple[str, Any], ...], dict[str, Any]]:
    """The look of each series: a colour by what is shared except k; line style and
    marker by k."""
    without_k = [label([s for s in shared if s[0] != "k"]) for shared in series]
    colour_of = colours(list(dict.fromkeys(without_k)))
    ks = sorted({dict(shared).get("k") or 0 for shared in series})
    looks = {}
    for shared, name in zip(series, without_k, strict=True):
        at = ks.index(dict(shared).get("k") or 0)
        looks[shared] = {
            "color": colour_of[name],
            "linestyle": LINES[at % len(LINES)],
            "marker": MARKERS[at % len(MARKERS)],
        }
    return looks


def plain_log(axis: Axis) -> None:
    """Labels a log axis with 1, 2, 5, 10, ..., or 1, 10, 100, ... where it is too long
    for all. To be called once the data or the limits are set."""
    low, high = axis.get_view_interval()
    axis.set_major_locator(
        LogLocator(subs=(1.0, 2.0, 5.0) if high / low < _LONG_LOG else (1.0,))
    )
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def save(figure: Figure, stem: Path) -> list[Path]:
    """`stem`.svg and `stem`.png."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    paths = [stem.with_name(f"{stem.name}.{kind}") for kind in ("svg", "png")]
    figure.savefig(paths[0], metadata={"Date": None, "Creator": "vsae_jax"})
    # Text stays text, and SVG drops spaces at its ends unless told not to, such as a
    # token's leading space or the columns of a table.
    drawn = paths[0].read_text(encoding="utf-8")
    replace_file(paths[0], with_spaces(drawn).encode())
    figure.savefig(paths[1], metadata={"Software": "vsae_jax"})
    return paths


def with_spaces(svg: str) -> str:
    """The SVG, with texts that keep their spaces. Each text says so, since Chromium
    ignores it on the whole document."""
    return svg.replace("<text ", '<text xml:space="preserve" ')


def drawable(text: str) -> str:
    """Text of tokens with line ends as arrows. Characters that the font cannot draw,
    such as control characters, become their codes."""
    arrows = text.replace("\n", "↵").replace("\t", "→")
    return "".join(
        c if c.isprintable() and _in_font(c) else c.encode("unicode_escape").decode()
        for c in arrows
    )


@cache
def _in_font(character: str) -> bool:
    path = font_manager.findfont("DejaVu Sans")
    return font_manager.get_font(path).get_char_index(ord(character)) != 0
