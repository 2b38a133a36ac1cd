"""A page for one latent: the paper's figures 6 and 7.

Drawn for every latent in `RUN/maximised/`, together with what is in `RUN/features/`.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from vsae_jax import runs
from vsae_jax.report.figures import style
from vsae_jax.runs import series
from vsae_jax.runs.series import Arm, MissingFile

CONTEXTS, LOGITS = 8, 5
# The characters in a line of text, and the width of one in a monospaced font.
_LINE, _CHARACTER_EM = 132, 0.602
_WIDTH = 11.0
_MIDDLE_BIN = 64


class Features(NamedTuple):
    """`features.npz` and `features.json` of a run."""

    arrays: Mapping[str, np.ndarray]
    texts: Mapping[str, str]


def pages(arms: Sequence[Arm]) -> Iterator[tuple[str, Figure]]:
    """A figure for each maximised latent of each arm."""
    paths = [
        (arm, p) for arm in arms for p in (arm.folder / "maximised").glob("*.json")
    ]
    if not paths:
        folder = arms[0].folder
        raise MissingFile(
            f"{folder / 'maximised'} is not there; make it with: python -m "
            f"vsae_jax.maximise --run={folder} --latents=..."
        )
    for arm, path in sorted(paths, key=lambda pair: int(pair[1].stem)):
        found = runs.read_json(path)
        name = series.label(list(arm.settings.items()))
        figure = _page(found, read_features(arm), title=f"{name}: latent {path.stem}")
        yield f"feature_{arm.folder.name}_{path.stem}", figure


def read_features(arm: Arm) -> Features:
    """What the pass over the held-out text found."""
    path = arm.path("features", "features.npz", made_by="features")
    texts = arm.read("features", "features.json", made_by="features")["tokens"]
    with np.load(path, allow_pickle=False) as stored:
        return Features({name: stored[name] for name in stored.files}, texts)


def _page(found: Mapping[str, Any], features: Features, *, title: str) -> Figure:
    latent, a = int(found["latent"]), features.arrays
    figure = style.figure(_WIDTH, 6.4)
    figure.suptitle(title)
    parts: Any = figure.subfigures(2, 1, height_ratios=(1.5, 1))
    text, below = parts
    ax = text.add_axes((0.01, 0.0, 0.98, 1.0))
    _texts(ax, _rows(found, features), most=float(a["max_activation"][latent]))
    histogram, logits, numbers = below.subplots(1, 3, width_ratios=(1.2, 1.4, 0.9))
    _histogram(histogram, a["histogram"][latent], float(a["histogram_width"][latent]))
    _logits(logits, features, latent)
    _numbers(numbers, a, latent, found)
    return figure


Row = tuple[str, Sequence[str], Sequence[float]]


def _rows(found: Mapping[str, Any], features: Features) -> list[Row]:
    """(name, tokens, activations) of the synthetic and the real maximum, then of the
    strongest contexts."""
    rows: list[Row] = [
        (kind, found[kind]["tokens"], found[kind]["activations"])
        for kind in ("synthetic", "real")
    ]
    a, latent = features.arrays, int(found["latent"])
    contexts = zip(a["top_ids"][latent], a["top_values"][latent], strict=True)
    for number, (ids, values) in enumerate(contexts, start=1):
        some = ids >= 0
        if number <= CONTEXTS and some.any():
            tokens = [features.texts[str(i)] for i in ids[some]]
            rows.append((f"top {number}", tokens, np.nan_to_num(values[some]).tolist()))
    return rows


def _texts(ax: Axes, rows: Sequence[Row], *, most: float) -> None:
    """Draws each row on a line; the stronger an activation, the darker its token."""
    # Long texts do not fit; the strongest token must stay visible.
    size = _WIDTH * 0.98 * 72 / (_LINE * _CHARACTER_EM)
    ax.set(xlim=(0, _LINE), ylim=(len(rows) + 0.5, -0.5))
    ax.axis("off")
    look = {"fontsize": size, "family": "DejaVu Sans Mono", "va": "center"}
    most = max(most, *(max(values) for _, _, values in rows), 1e-30)
    for y, (name, tokens, values) in enumerate(rows):
        ax.text(0, y, f"{name} {max(values):.3g}", parse_math=False, **look)
        shown = [style.drawable(token) for token in tokens]
        x, first = 18, _first_shown(shown, int(np.argmax(values)), room=_LINE - 18)
        for token, value in zip(shown[first:], values[first:], strict=True):
            if x + len(token) > _LINE:
                break
            strength = min(max(value / most, 0.0), 1.0)
            if strength:
                colour = colormaps["Oranges"](0.1 + 0.6 * strength)
                ground = Rectangle((x, y - 0.4), len(token), 0.8, color=colour, lw=0)
                ax.add_patch(ground)
            ax.text(x, y, token, parse_math=False, **look)
            x += len(token)


def _first_shown(tokens: Sequence[str], peak: int, *, room: int) -> int:
    """The first token to show, so that the peak fits into `room` characters."""
    first = 0
    while first < peak and sum(map(len, tokens[first : peak + 1])) > room:
        first += 1
    return first


def _histogram(ax: Axes, counts: np.ndarray, width: float) -> None:
    some = np.flatnonzero(counts)
    ax.set(title="Activations", xlabel="activation (scaled input)", ylabel="tokens")
    if len(some):
        used = slice(some[0], some[-1] + 1)
        edges = (np.arange(len(counts) + 1) - _MIDDLE_BIN) * width
        ax.stairs(counts[used], edges[used.start : used.stop + 1], fill=True)
        ax.set_yscale("log")


def _logits(ax: Axes, features: Features, latent: int) -> None:
    """The tokens that the latent's decoder row makes likelier and unlikelier."""
    a = features.arrays
    ids = [*a["top_logit_tokens"][latent, :LOGITS]]
    ids += [*a["bottom_logit_tokens"][latent, :LOGITS][::-1]]
    values = [
        *a["top_logits"][latent, :LOGITS],
        *a["bottom_logits"][latent, :LOGITS][::-1],
    ]
    y = np.arange(len(ids))
    colours = [style.BLUE if value > 0 else style.VERMILLION for value in values]
    ax.barh(y, values, color=colours)
    ax.invert_yaxis()
    ax.set(
        title="Logit effects",
        xlabel="logits along the decoder row, at norm 1",
        yticks=[],
    )
    for place, token, value in zip(y.tolist(), ids, values, strict=True):
        word = style.drawable(features.texts[str(token)])
        side = "right" if value > 0 else "left"
        ax.text(0, place, f" {word} ", ha=side, va="center", parse_math=False)


def _numbers(
    ax: Axes, a: Mapping[str, np.ndarray], latent: int, found: Mapping[str, Any]
) -> None:
    ax.axis("off")
    lines = {
        "firing rate": a["firing_rate"][latent],
        "mean when active": a["mean_when_active"][latent],
        "maximum": a["max_activation"][latent],
        "decoder norm": a["decoder_norm"][latent],
        "best synthetic": max(found["synthetic"]["activations"]),
        "best real": max(found["real"]["activations"]),
    }
    text = "\n".join(f"{name:<17}{value:>9.4g}" for name, value in lines.items())
    ax.text(0, 0.9, text, family="DejaVu Sans Mono", va="top", fontsize=8)
