"""Does sampling find more of the features that are really there?

Claim (Baker and Li 1.1, 2.3): sampling creates a dispersive pressure that organises
features and keeps them from overlapping. On a language model nobody knows the features;
here rows are sums of known ones (experiments.synthetic), which fire each on its own or
in groups, and each autoencoder's decoder is compared with them (experiments.recovery).

Command:

    python -m experiments.reproduce --scale=standin --only=ground_truth --out=DIR

The paper has no such test. Expected, if the claim holds: with sampling more features
are recovered, and fewer latents are duplicates or mixtures, above all in groups. Arms
have as many latents as there are features and k their mean number on a row, no arm's
learning rate is tuned, and the norm of the scaled rows is 10 sqrt(d_model).
"""

import functools
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jaxtyping import Float

from experiments import ablation, recovery, synthetic
from experiments.effects import effects_table
from experiments.paired import Interval, difference, interval
from experiments.report import Filed, Section, Table
from experiments.study import Arms, Study, kind_and_seed
from vsae_jax import runs
from vsae_jax.autoencoder import sae
from vsae_jax.autoencoder.sparsity import compiler_options
from vsae_jax.runs import series

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Way in which features fire -> whether in groups.
WAYS = {"independent": False, "correlated": True}
KINDS = (
    "topk",
    "topk_auxk",
    "topk_noise",
    "topk_kl",
    "vsae",
    "vsae_no_noise",
    "vsae_no_penalty",
    "vsae_relu",
    "vsae_learned",
    "vsae_beta-0.01",
)
MEASURES = {
    "recovered": "recovered",
    "mean_max_cosine": "nearest cosine",
    "f1": "F1 of firing",
    "duplicates": "duplicates",
    "merged": "merged",
    "alive": "alive",
}
COMPARED = {name: MEASURES[name] for name in ("recovered", "duplicates", "merged")}
FILE = "recovery.json"
ROWS, _BATCH = 20_480, 2048
# Not a seed of the features: theirs would give them themselves.
_RANDOM = 2**31 - 1
Found = Mapping[str, Mapping[int, Mapping[str, float]]]
HeldOut = Callable[[], tuple[np.ndarray, np.ndarray]]


def grids(study: Study) -> dict[str, Arms]:
    """Every kind and seed on the rows of each way; writes nothing."""
    t = study.scale.truth
    kinds = [kind for kind in t.kinds or KINDS if kind in ablation.kinds(study)]
    return {
        _grid(way): {
            f"{kind}_seed-{seed}": ablation.configured(
                kind,
                activations=str(_rows_path(study, way)),
                seed=seed,
                d_sae=t.n_features,
                k=t.active,
                steps=t.steps,
                batch_size=t.batch_size,
                input_scale=_norm(study),
                checkpoint_every=t.steps,
                log_every=max(t.steps // 4, 1),
            )
            for kind in kinds
            for seed in range(t.seeds)
        }
        for way in WAYS
    }


def run(study: Study) -> Section:
    """Writes rows, trains, measures and compares."""
    found = {}
    for way, correlated in WAYS.items():
        path = _rows_path(study, way)
        synthetic.write(path, study.scale.truth, correlated=correlated)
        study.train(_grid(way), grids(study)[_grid(way)])
        found[way] = _measured(study, way)
    parts: list[str | Table | Path] = [_setting(study)]
    panels = {f"Features fire {in_words(way)}": found[way] for way in found}
    parts.append(study.save("ground_truth", figure(panels)))
    for way, of_way in found.items():
        parts.append(f"Features that fire {in_words(way)}, mean ± sd over seeds:")
        parts.append(Filed(_values(study, way, of_way)))
    effects = _effects(found)
    columns = [_column(name, way) for way in found for name in COMPARED]
    parts.append(
        "Differences to `topk` (the last: what sampling does in the vSAE), paired over "
        f"seeds. {_caution(sum(map(len, effects.values())))}"
    )
    parts.append(effects_table(effects, {column: column for column in columns}))
    return Section(
        "Known features",
        "sampling creates a dispersive pressure that organises features and keeps them "
        "from overlapping",
        "no test against known features",
        parts,
    )


def _effects(found: Mapping[str, Found]) -> dict[str, dict[str, Interval]]:
    """Each kind, and its compared measures in every way, less TopK's; and the vSAE less
    the one that never samples."""
    effects: dict[str, dict[str, Interval]] = {}
    for way, of_way in found.items():
        pairs = {kind: (kind, "topk") for kind in of_way if kind != "topk"}
        pairs["vsae against vsae_no_noise"] = ("vsae", "vsae_no_noise")
        for name, (kind, other) in pairs.items():
            if by_measure := compare(of_way, kind, other):
                named = {_column(m, way): i for m, i in by_measure.items()}
                effects.setdefault(name, {}).update(named)
    return effects


def _column(measure: str, way: str) -> str:
    return f"{COMPARED[measure]}, {in_words(way)}"


def compare(found: Found, kind: str, other: str) -> dict[str, Interval]:
    """kind - other of each compared measure; empty where they share no seed."""
    a, b = found.get(kind, {}), found.get(other, {})
    if not a.keys() & b.keys():
        return {}
    return {name: difference(of(a, name), of(b, name)) for name in COMPARED}


def measure(folder: Path, rows: HeldOut, directions: np.ndarray) -> dict[str, float]:
    """The measures of a trained arm, kept in its folder."""
    path = folder / FILE
    if not path.is_file():
        arm = runs.open_run(folder)
        x, codes = rows()
        fires = encoded(arm, x) > 0
        w_dec = np.asarray(arm.variables["params"]["w_dec"])
        found = recovery.recovery(w_dec, directions, fires=fires, truly=codes > 0)
        runs.write_json(path, {"rows": len(x), "measures": found})
    return runs.read_json(path)["measures"]


def encoded(
    arm: runs.TrainedSAE, x: Float[np.ndarray, "rows d_model"]
) -> Float[np.ndarray, "rows d_sae"]:
    """The latents of raw rows, at the mean."""
    batches = np.array_split(x, -(-len(x) // _BATCH))
    parts = [_encode(arm.variables, batch, config=arm.sae) for batch in batches]
    return np.concatenate([np.asarray(part) for part in parts])


def _measured(study: Study, way: str) -> dict[str, dict[int, dict[str, float]]]:
    """Each kind of arm: its measures by seed."""
    features = _features(study, way)

    @functools.cache
    def rows() -> tuple[np.ndarray, np.ndarray]:
        return synthetic.held_out(features, ROWS)

    found: dict[str, dict[int, dict[str, float]]] = {}
    for arm in study.arms(_grid(way)):
        kind, seed = kind_and_seed(arm.folder.name)
        measures = measure(arm.folder, rows, features.directions)
        found.setdefault(kind, {})[seed] = measures
    return found


def _values(study: Study, way: str, found: Found) -> Table:
    """A row a kind; below, what the decoder's measures are for random directions."""
    table = [["arm", "seeds", *MEASURES.values()]]
    for kind, seeds in found.items():
        cells = [series.spread(list(of(seeds, name).values())) for name in MEASURES]
        table.append([kind, str(len(seeds)), *cells])
    true = _features(study, way).directions
    drawn = np.random.default_rng(_RANDOM).standard_normal(true.shape)
    floor = recovery.of_directions(drawn, true)
    cells = [f"{floor[name]:.4f}" if name in floor else "-" for name in MEASURES]
    return [*table, ["random directions", "1", *cells]]


def _caution(intervals: int) -> str:
    return (
        f"These are {intervals} intervals of 95 %: where nothing differs, about one in "
        "twenty excludes 0 all the same. Recovered moves in steps of one feature, so "
        "that few seeds may agree to the last digit; an interval without width is no "
        "evidence."
    )


def _setting(study: Study) -> str:
    t, norm = study.scale.truth, _norm(study)
    # Amplitudes have mean 1.5 and mean square 3.25.
    height = norm * 1.5 / math.sqrt(3.25 * t.active)
    return (
        f"{t.n_features} random directions in {t.d_model} dimensions, {t.active} on a "
        f"row in the mean, alone or in groups of {t.group} of which each member fires "
        f"half the time; {t.n_rows:,} rows. d_sae {t.n_features}, k {t.active}, "
        f"{t.steps} steps of {t.batch_size} rows, seeds 0 to {t.seeds - 1}, the "
        f"preset's learning rate for every kind; rows scaled to root mean square norm "
        f"{norm:.1f}, at which a feature that fires is about {height:.0f} sigma of the "
        f"noise high; measured on {ROWS:,} fresh rows at the mean. "
        f"Recovered: share of features whose latent (matched one to one) has cosine > "
        f"{recovery.FOUND}. Duplicates: share of alive latents that are a feature that "
        "another one is already. Merged: share of alive latents with cosine > "
        f"{recovery.PART} to a second feature, the first taken away."
    )


def figure(panels: Mapping[str, Found], title: str = "") -> "Figure":
    """A panel a title: recovered share by kind, its 95 % interval over seeds; `title`
    is the whole figure's."""
    from vsae_jax.report.figures import style

    with style.applied():
        kinds = list(
            dict.fromkeys(kind for of_panel in panels.values() for kind in of_panel)
        )
        drawn = style.figure(8.0, 1.4 + 0.26 * len(kinds))
        all_axes = drawn.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for ax, (name, of_panel) in zip(all_axes, panels.items(), strict=True):
            for kind, seeds in of_panel.items():
                values = list(of(seeds, "recovered").values())
                _bar(ax, kinds.index(kind), kind, values)
            ax.set(title=name, xlabel="recovered (better →)")
            ax.set_xlim(0, 1)
        all_axes[0].set_yticks(range(len(kinds)), kinds)
        all_axes[0].invert_yaxis()
        style.caption(
            drawn, "Mean over seeds; line: its 95 % interval, cut at 0 and 1."
        )
        if title:
            style.title(drawn, title)
    return drawn


def _bar(ax: Any, place: int, kind: str, values: list[float]) -> None:
    from vsae_jax.report.figures import style

    found = interval(values)
    colour = style.VERMILLION if kind.startswith("v") else style.BLUE
    ax.barh(place, found.mean, height=0.6, color=colour)
    if found.n > 1:
        ends = [max(found.low, 0.0), min(found.high, 1.0)]
        ax.plot(ends, [place, place], color=style.BLACK, linewidth=1.2)


def of(seeds: Mapping[int, Mapping[str, float]], name: str) -> dict[int, float]:
    return {seed: measures[name] for seed, measures in seeds.items()}


def _features(study: Study, way: str) -> synthetic.Features:
    return synthetic.make_features(study.scale.truth, correlated=WAYS[way])


def in_words(way: str) -> str:
    return "in groups" if WAYS[way] else "each on its own"


def _norm(study: Study) -> float:
    """Root mean square norm of the scaled rows."""
    return 10 * math.sqrt(study.scale.truth.d_model)


def _grid(way: str) -> str:
    return f"truth-{way}"


def _rows_path(study: Study, way: str) -> Path:
    return study.out / "rows" / _grid(way)


_encode = jax.jit(
    sae.encode, static_argnames="config", compiler_options=compiler_options()
)
