"""Where does a sampled vSAE train? The scale of the input against noise of sigma = 1.

The paper fixes sigma = 1 and says nothing of the input's scale; its code divides rows
by their root mean square norm and never samples. Here the norm of the scaled rows goes
from 1 to 10 sqrt(d_model), beta from 0 to 1, decoder rows have norm 1 or are free, and
TopK is trained at each norm beside the vSAE. Every cell takes the better of two
learning rates, by the explained variance of its mean over seeds.

Command:

    python -m experiments.reproduce --scale=standin --only=signal_to_noise --out=DIR

The paper has no such map. What was found is in experiments/results/standin/report.md.
"""

import math
import statistics
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from experiments.paired import Interval, difference
from experiments.report import Section, Table
from experiments.study import Arms, Study
from vsae_jax import runs
from vsae_jax.activations.shards import Activations
from vsae_jax.config import TrainConfig
from vsae_jax.system.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GRID = "signal_to_noise"
DECODERS = ("unit", "free")
_MEASURES = ("explained_variance", "alive", "entropy_effective_latents")
# A sampled vSAE trains where it is that close to TopK in explained variance.
_CLOSE = 0.03


class Cell(NamedTuple):
    """A vSAE against TopK at the same norm and decoder: each measure by seed."""

    norm: float
    beta: float
    decoder: str
    vsae: Mapping[int, Mapping[str, float]]
    topk: Mapping[int, Mapping[str, float]]

    def difference(self, measure: str) -> Interval:
        """vSAE - TopK, paired over seeds."""
        return difference(
            {seed: m[measure] for seed, m in self.vsae.items()},
            {seed: m[measure] for seed, m in self.topk.items()},
        )

    def mean(self, measure: str) -> float:
        """Of the vSAE."""
        return statistics.fmean(m[measure] for m in self.vsae.values())


def norms(study: Study) -> list[float]:
    """Root mean square norms of the scaled rows, ascending."""
    path = study.rows_path("paper", study.layer)
    # Before the rows are there (a dry run) sqrt(d_model) is that of Pythia-70M.
    there = (path / "manifest.json").is_file()
    d_model = Activations.open(path).d_model if there else 512
    found = (m * math.sqrt(d_model) for m in study.scale.controlled.norms)
    return [max(round(norm, 2), 1.0) for norm in found]


def unit(study: Study) -> float:
    """Of the norms the one nearest sqrt(d_model), where a coordinate is about 1."""
    multiples = study.scale.controlled.norms
    nearest = min(multiples, key=lambda m: abs(math.log(m)) if m else math.inf)
    return norms(study)[multiples.index(nearest)]


def grids(study: Study) -> dict[str, Arms]:
    """TopK and the vSAE at every norm, decoder, learning rate and seed."""
    c = study.scale.controlled
    shared: dict[str, Any] = {
        "activations": str(study.rows_path("paper", study.layer)),
        "max_norm_multiple": study.scale.text.max_norm_multiple,
        "d_sae": c.d_sae,
        "k": c.k,
        "steps": c.map_steps,
        "batch_size": c.batch_size,
        "dtype": study.scale.dtype,
        "checkpoint_every": c.map_steps,
        "log_every": max(c.map_steps // 2, 1),
    }
    kinds: dict[str, dict[str, Any]] = {"topk": {"variant": "topk", "auxk": 0.0}} | {
        f"vsae_beta-{beta:g}": {"variant": "vsae_topk", "beta": beta}
        for beta in c.map_betas
    }
    arms = {}
    for norm in norms(study):
        for decoder in DECODERS:
            for kind, fields in kinds.items():
                for lr in c.map_lrs:
                    for seed in range(c.map_seeds):
                        name = f"{kind}_norm-{norm:g}_{decoder}_lr-{lr:g}_seed-{seed}"
                        arms[name] = TrainConfig(
                            **shared,
                            **fields,
                            input_scale=norm,
                            decoder_norm=decoder,
                            lr=lr,
                            seed=seed,
                        )
    return {GRID: arms}


def cells(study: Study) -> list[Cell]:
    """The map, of what is evaluated; a cell without a finished arm is left out."""
    c, found = study.scale.controlled, study.metrics(GRID)

    def best(kind: str, norm: float, decoder: str) -> Mapping[int, Mapping[str, float]]:
        tried = [
            found[name]
            for lr in c.map_lrs
            if (name := f"{kind}_norm-{norm:g}_{decoder}_lr-{lr:g}") in found
        ]
        return max(tried, key=_explained, default={})

    made = [
        Cell(
            norm,
            beta,
            decoder,
            vsae=best(f"vsae_beta-{beta:g}", norm, decoder),
            topk=best("topk", norm, decoder),
        )
        for norm in norms(study)
        for beta in c.map_betas
        for decoder in DECODERS
    ]
    return [cell for cell in made if cell.vsae and cell.topk]


def _explained(seeds: Mapping[int, Mapping[str, float]]) -> float:
    return statistics.fmean(m["explained_variance"] for m in seeds.values())


def recommended(study: Study) -> float:
    """The scale's own norm; where it has none, the smallest at which the vSAE with a
    unit decoder and some beta is within 0.03 of TopK's explained variance; where there
    is none, or nothing is evaluated yet, the largest."""
    if norm := study.scale.controlled.norm:
        return norm
    if not (study.grid(GRID) / runs.GRID).is_file():
        return norms(study)[-1]
    near = [c.norm for c in _near_topk(cells(study)) if c.decoder == "unit"]
    return min(near, default=norms(study)[-1])


def measured(study: Study) -> None:
    """Trains and evaluates the map."""
    study.rows("paper", study.layer)
    study.train(GRID, grids(study)[GRID])
    study.evaluate(GRID, "core")


def run(study: Study) -> Section:
    """The map as a figure and as a table."""
    measured(study)
    c, found = study.scale.controlled, cells(study)
    if not found:
        raise UserError(f"{GRID}: nothing is evaluated yet")
    figure = study.save("signal_to_noise", draw(found))
    return Section(
        "Signal to noise",
        "sampling at sigma = 1 (Baker and Li 2.2.1)",
        "input scale and decoder norm are not mentioned; the code never samples",
        [
            f"d_sae {c.d_sae}, k {c.k}, {c.map_steps} steps of {c.batch_size} rows, "
            f"{c.map_seeds} seeds, the better of learning rates "
            f"{', '.join(f'{lr:g}' for lr in c.map_lrs)} in each cell. Norm: root mean "
            "square norm of the scaled rows; differences are vSAE - TopK at the same "
            "norm and decoder, paired over seeds, with 95 % intervals.",
            figure,
            _table(found),
            _words(study, found),
        ],
    )


def _table(found: list[Cell]) -> Table:
    names = ["expl. var.", "alive", "effective"]
    rows = [["decoder", "norm", "beta", *(f"{n}, vSAE - TopK" for n in names)]]
    rows[0][3:3] = ["expl. var. of the vSAE", "alive", "effective"]
    for cell in sorted(found, key=lambda c: (c.decoder != "unit", c.norm, c.beta)):
        means = [cell.mean(m) for m in _MEASURES]
        differences = [str(cell.difference(m)) for m in _MEASURES]
        values = [f"{means[0]:.4f}", f"{means[1]:.1f}", f"{means[2]:.1f}"]
        setting = [cell.decoder, f"{cell.norm:g}", f"{cell.beta:g}"]
        rows.append([*setting, *values, *differences])
    return rows


def near_topk(found: list[Cell]) -> str:
    """Where it explains about as much as TopK."""
    return (
        f"Within {_CLOSE:g} of TopK's explained variance: {_named(_near_topk(found))}."
    )


def _near_topk(found: list[Cell]) -> list[Cell]:
    return [c for c in found if c.difference("explained_variance").mean > -_CLOSE]


def _words(study: Study, found: list[Cell]) -> str:
    """Where it trains, where it collapses, where it spreads selection."""
    collapsed = [c for c in found if c.mean("explained_variance") <= 0]
    spread = [c for c in _near_topk(found) if c.difference(_MEASURES[2]).sign > 0]
    killed = [c for c in _near_topk(found) if c.difference("alive").sign < 0]
    lines = [
        f"Collapsed (explained variance of at most 0): {_named(collapsed)}.",
        near_topk(found),
        "Of those, selection spread over more latents than TopK's (interval above "
        f"0): {_named(spread)}.",
        f"Of those, fewer latents alive than TopK's: {_named(killed)}.",
        f"The other experiments run at norm {recommended(study):g}.",
    ]
    return " ".join(lines)


def _named(found: list[Cell]) -> str:
    """`unit decoder at norm 1 (beta 0, 0.1)`, ...; `none`."""
    betas: dict[tuple[bool, float], list[str]] = {}
    for cell in sorted(found, key=lambda c: (c.decoder != "unit", c.norm, c.beta)):
        place = cell.decoder != "unit", cell.norm
        betas.setdefault(place, []).append(f"{cell.beta:g}")
    names = [
        f"{'free' if free else 'unit'} decoder at norm {norm:g} (beta {', '.join(of)})"
        for (free, norm), of in betas.items()
    ]
    return "; ".join(names) or "none"


def draw(found: list[Cell]) -> "Figure":
    """Rows are decoders, columns measures; each cell says vSAE - TopK."""
    from vsae_jax.report.figures import style

    titles = ("explained variance", "alive latents", "effective latents")
    with style.applied():
        figure = style.figure(14, 5.5)
        all_axes = figure.subplots(len(DECODERS), len(_MEASURES), squeeze=False)
        for row, decoder in zip(all_axes, DECODERS, strict=True):
            of_decoder = [c for c in found if c.decoder == decoder]
            for ax, measure, title in zip(row, _MEASURES, titles, strict=True):
                _heat_map(ax, of_decoder, measure)
                ax.set_title(f"{title}, {decoder} decoder")
        style.caption(
            figure, "vSAE - TopK at the same norm and decoder, mean over seeds."
        )
    return figure


def _heat_map(ax: Any, found: list[Cell], measure: str) -> None:
    import numpy as np

    x = sorted({c.norm for c in found})
    y = sorted({c.beta for c in found})
    values = np.full((len(y), len(x)), np.nan)
    for c in found:
        values[y.index(c.beta), x.index(c.norm)] = c.difference(measure).mean
    limit = 0.2 if measure == "explained_variance" else np.nanmax(np.abs(values))
    image = ax.imshow(values, cmap="PuOr", vmin=-limit, vmax=limit, aspect="auto")
    beyond = "both" if np.nanmax(np.abs(values)) > limit else "neither"
    ax.figure.colorbar(image, ax=ax, extend=beyond, label="vSAE - TopK")
    for i, j in np.ndindex(values.shape):
        # Adding 0 makes of the -0 that a small loss is rounded to a 0.
        rounded = round(values[i, j], 2 if limit < 1 else 0) + 0.0
        text = f"{rounded:.2f}" if limit < 1 else f"{rounded:.0f}"
        dark = abs(values[i, j]) > 0.7 * limit
        ax.text(j, i, text, ha="center", va="center", color="w" if dark else "k")
    ax.set_xticks(range(len(x)), [f"{v:g}" for v in x])
    ax.set_yticks(range(len(y)), [f"{v:g}" for v in y])
    ax.set(xlabel="norm of the scaled rows", ylabel="beta")
    ax.grid(False)
