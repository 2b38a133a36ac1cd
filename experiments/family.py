"""Which autoencoder finds the features that are really there, and finds them again?

Every variant on rows of known features (experiments.synthetic) at one L0, the mean
number of features on a row. Where k decides L0 it is that number, jump_relu has it as
its target, the weight of an L1 penalty is searched for, and vaease closes gates until
it is there; vsae has no sparsifier, and no L0. AuxK is off. Learning rates and weights
are those with the best explained variance at that L0, on rows that nothing is measured
on and with a seed of their own; a range whose end is the best is widened.

Command:

    python -m experiments.reproduce --scale=standin --only=family --out=DIR

The paper has no such test. Beside what ground_truth measures: of two seeds, do latents
return, and are those that do true? What a variant gives is one file of
OUT/family/; to make several side by side,

    python -m experiments.family --scale=standin --out=DIR --variants=topk,relu
"""

import functools
import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float

from experiments import recovery, synthetic
from experiments.effects import effects_table
from experiments.ground_truth import (
    MEASURES,
    ROWS,
    WAYS,
    Found,
    compare,
    encoded,
    figure,
    in_words,
    of,
)
from experiments.report import Section, Table
from experiments.scales import SCALES, ScaleName
from experiments.study import Arms, Study, say
from vsae_jax import runs
from vsae_jax.autoencoder import posterior, sae
from vsae_jax.config import TrainConfig, cli
from vsae_jax.config.fields import flag
from vsae_jax.config.presets import VARIANTS
from vsae_jax.runs import series
from vsae_jax.system.errors import UserError

# The penalties whose weight decides L0: what it starts at, times the norm of the rows.
WEIGHTS: dict[str, tuple[str, tuple[float, ...]]] = {
    "relu": ("l1", (0.1, 0.2, 0.4, 0.8)),
    "gated": ("gate_l1", (0.1, 0.2, 0.4, 0.8)),
    "vsae_gated": ("gate_l1", (0.1, 0.2, 0.4, 0.8)),
}
TWINS = {v: v.removeprefix("vsae_") for v in VARIANTS if v.startswith("vsae_")}
# An L0 is the asked one if it is no further from it.
TOLERANCE = 0.1
STABILITY = {
    "returns": "returns",
    "returning_true": "of these true",
    "true_return": "true that return",
    "false_return": "false that return",
}
_SEED, _ROUNDS = 1000, 4
# Weights found by interpolation are tried themselves until they are as near.
_NEAR = 0.03


class Setting(NamedTuple):
    """What is searched over; weight: of the penalty that decides L0, in norms."""

    norm: float
    lr: float
    weight: float


class Point(NamedTuple):
    """A setting and what it gives."""

    setting: Setting
    l0: float
    explained_variance: float


class Choice(NamedTuple):
    """What is best at a norm; `inside`: the rate is not an end of those tried."""

    setting: Setting
    l0: float
    explained_variance: float
    inside: bool


@dataclass(frozen=True)
class Case:
    """One variant on the rows of one way."""

    study: Study
    way: str
    variant: str

    @property
    def file(self) -> Path:
        """What is found."""
        return self.study.out / "family" / f"{self.way}-{self.variant}.json"

    @property
    def norms(self) -> list[float]:
        """Root mean square norms of the scaled rows."""
        f = self.study.scale.family
        return [round(n * math.sqrt(f.truth.d_model), 2) for n in f.norms]

    @property
    def weights(self) -> tuple[float, ...]:
        """The first weights; a single 0 where none decides L0."""
        return WEIGHTS[self.variant][1] if self.variant in WEIGHTS else (0.0,)

    def grid(self, name: str) -> str:
        """The name of one of its grids."""
        return f"family-{self.way}-{self.variant}-{name}"

    def arms(self, settings: Sequence[Setting], seeds: Sequence[int]) -> Arms:
        """Their configs by the names of their folders."""
        return {
            _name(setting, seed): self.config(setting, seed)
            for setting in settings
            for seed in seeds
        }

    def config(self, setting: Setting, seed: int) -> TrainConfig:
        """The config of an arm."""
        t, norm = self.study.scale.family.truth, setting.norm
        # Thresholds that start near 0 would need longer to where they end.
        target = {"target_l0": float(t.active), "l0": norm**2}
        target |= {"threshold_init": 0.05 * norm, "bandwidth": 0.02 * norm}
        has_target = self.variant.endswith("jump_relu")
        weights = {}
        if self.variant in WEIGHTS:
            weights = {WEIGHTS[self.variant][0]: setting.weight * norm}
        fields: dict[str, Any] = weights | (target if has_target else {})
        return TrainConfig(
            activations=str(rows_path(self.study, self.way)),
            variant=self.variant,  # pyright: ignore[reportArgumentType]
            d_sae=t.n_features,
            k=t.active,
            auxk=0.0,
            steps=t.steps,
            batch_size=t.batch_size,
            input_scale=norm,
            lr=setting.lr,
            seed=seed,
            dtype="float32",
            checkpoint_every=0,
            log_every=t.steps,
            steps_per_dispatch=50,
            **fields,
        )

    @functools.cached_property
    def features(self) -> synthetic.Features:
        """The known ones."""
        truth = self.study.scale.family.truth
        return synthetic.make_features(truth, correlated=WAYS[self.way])

    @functools.cached_property
    def tuning_rows(self) -> Float[np.ndarray, "rows d_model"]:
        """Rows that nothing is measured on."""
        return synthetic.held_out(self.features, ROWS, seed=1)[0]


def grids(study: Study) -> dict[str, Arms]:
    """The first search of every variant, and its arms at a setting of it."""
    found = {}
    for case in cases(study):
        first = first_settings(case)
        lr = study.scale.family.lrs[0]
        chosen = [s for s in first if s.lr == lr and s.weight == case.weights[0]]
        found[case.grid("search-0")] = case.arms(first, [_SEED])
        found[case.grid("arms")] = case.arms(chosen, _seeds(study))
    return found


def cases(study: Study, variants: Sequence[str] = ()) -> list[Case]:
    """All variants of the scale, or those named, on the rows of either way."""
    variants = variants or study.scale.family.truth.kinds or list(VARIANTS)
    return [Case(study, way, variant) for way in WAYS for variant in variants]


def first_settings(case: Case) -> list[Setting]:
    """What is tried first."""
    lrs = case.study.scale.family.lrs
    return [Setting(*s) for s in itertools.product(case.norms, lrs, case.weights)]


def measured(case: Case) -> dict[str, Any]:
    """What a variant gives, from its file; trained and measured where there is none.

    searched: every setting tried and what it gave. chosen: by norm. arms: by norm and
    seed, the measures of ground_truth, L0, explained variance, and those of stability,
    means over the other seeds.
    """
    if not case.file.is_file():
        write_rows(case.study, case.way)
        points, choices = search(case)
        settings = [choice.setting for choice in choices]
        arms = case.arms(settings, _seeds(case.study))
        folder = case.study.train(case.grid("arms"), arms)
        found = {
            "variant": case.variant,
            "way": case.way,
            "searched": [[*p.setting, *p[1:]] for p in points],
            "chosen": [[*c.setting, *c[1:]] for c in choices],
            "arms": {f"{s.norm:g}": _of_seeds(case, folder, s) for s in settings},
        }
        case.file.parent.mkdir(parents=True, exist_ok=True)
        runs.write_json(case.file, found)
    return runs.read_json(case.file)


def search(case: Case) -> tuple[list[Point], list[Choice]]:
    """Tries settings, and further ones while a choice calls for them."""
    points: list[Point] = []
    wanted = first_settings(case)
    for turn in range(_ROUNDS):
        folder = case.study.train(
            case.grid(f"search-{turn}"), case.arms(wanted, [_SEED])
        )
        points += [
            Point(setting, *_fit(case, arm)[1:])
            for setting in wanted
            if (arm := _opened(folder / _name(setting, _SEED)))
        ]
        choices = [choose(case, norm, points) for norm in case.norms]
        wanted = [
            further
            for choice in choices
            for further in further_settings(case, choice, points)
        ]
        if not wanted:
            break
    return points, choices


def choose(case: Case, norm: float, points: Sequence[Point]) -> Choice:
    """Of a norm's rates the one with the best explained variance among those that come
    to the L0; where none does, or none can, the nearest to it."""
    k = case.study.scale.family.truth.active
    by_rate: dict[float, list[Point]] = {}
    for point in points:
        if point.setting.norm == norm:
            by_rate.setdefault(point.setting.lr, []).append(point)
    if not by_rate:
        raise UserError(f"every arm of {case.variant} at norm {norm:g} diverged")
    best = max(
        (at_l0(of_rate, k) for of_rate in by_rate.values()),
        key=lambda p: (-max(_distance(p.l0, k), TOLERANCE), p.explained_variance),
    )
    inside = min(by_rate) < best.setting.lr < max(by_rate)
    return Choice(*best, inside=inside)


def at_l0(points: Sequence[Point], k: float) -> Point:
    """What is expected at L0 `k` of the points of one rate: between the two weights
    whose L0 are around it, on a line in log L0 and log weight; else the nearest one."""
    ordered = sorted(points, key=lambda p: p.setting.weight)
    for low, high in itertools.pairwise(ordered):
        if high.l0 <= k < low.l0 and high.l0 > 0:
            share = math.log(low.l0 / k) / math.log(low.l0 / high.l0)
            weights = low.setting.weight, high.setting.weight
            weight = weights[0] * (weights[1] / weights[0]) ** share
            ends = low.explained_variance, high.explained_variance
            explained = ends[0] + share * (ends[1] - ends[0])
            return Point(low.setting._replace(weight=weight), k, explained)
    return min(ordered, key=lambda p: _distance(p.l0, k))


def further_settings(
    case: Case, choice: Choice, points: Sequence[Point]
) -> list[Setting]:
    """What to try next at a norm: the next rate where the best is an end; else a weight
    nearer to the L0. Nothing where neither is called for."""
    lrs = sorted(
        {p.setting.lr for p in points if p.setting.norm == choice.setting.norm}
    )
    if not choice.inside:
        ratio = case.study.scale.family.lrs[1] / case.study.scale.family.lrs[0]
        lr = choice.setting.lr * (ratio if choice.setting.lr == lrs[-1] else 1 / ratio)
        return [choice.setting._replace(lr=lr, weight=w) for w in case.weights]
    if case.variant not in WEIGHTS:
        return []
    k = case.study.scale.family.truth.active
    same = [p for p in points if p.setting[:2] == choice.setting[:2]]
    if any(_distance(p.l0, k) < _NEAR for p in same):
        return []
    weight = choice.setting.weight
    if choice.l0 != k:  # all are on one side of it
        weight *= 2 if choice.l0 > k else 0.5
    return [choice.setting._replace(weight=weight)]


class Encoded(NamedTuple):
    """An arm's latents of some rows at the L0, and what they give."""

    f: Float[np.ndarray, "rows d_sae"]
    l0: float
    explained_variance: float


def _fit(
    case: Case, arm: runs.TrainedSAE, rows: Float[np.ndarray, "n d_model"] | None = None
) -> Encoded:
    """Latents of `rows`, unset the tuning rows, and what they give. Gates by sigma are
    closed so far that the L0 is there on the tuning rows."""
    x = case.tuning_rows if rows is None else rows
    f = encoded(arm, x)
    if arm.sae.gate == "sigma":
        k = case.study.scale.family.truth.active
        openings = _openings(arm.variables, case.tuning_rows, arm.sae)
        least = np.partition(openings, -k * len(openings), None)[-k * len(openings)]
        f = np.where(_openings(arm.variables, x, arm.sae) >= least, f, 0)
    error = x - np.asarray(
        sae.decode(arm.variables, jax.numpy.asarray(f), config=arm.sae)
    )
    variance = np.square(x - x.mean(0)).sum(dtype=float)
    explained = 1 - float(np.square(error).sum(dtype=float) / variance)
    return Encoded(f, float((f != 0).sum(1).mean()), explained)


def _openings(variables: Any, x: np.ndarray, config: Any) -> np.ndarray:
    """How far each gate by sigma is open, `[rows, d_sae]`."""
    x_n = sae.normalise(variables, jax.numpy.asarray(x))
    log_var = posterior.log_variance(variables["params"], x_n, config=config)
    assert log_var is not None  # a gate by sigma has one
    return 1 - np.exp(0.5 * np.asarray(log_var))


def _of_seeds(case: Case, folder: Path, setting: Setting) -> dict[str, Any]:
    """The measures of a setting's arms, by seed; without those that diverged."""
    x, codes = synthetic.held_out(case.features, ROWS)
    true = case.features.directions
    found: dict[int, dict[str, Any]] = {}
    rows: dict[int, np.ndarray] = {}
    for seed in _seeds(case.study):
        if arm := _opened(folder / _name(setting, seed)):
            fit = _fit(case, arm, x)
            fires = fit.f > 0
            w_dec = np.asarray(arm.variables["params"]["w_dec"])
            found[seed] = recovery.recovery(w_dec, true, fires=fires, truly=codes > 0)
            found[seed] |= {"l0": fit.l0, "explained_variance": fit[2]}
            rows[seed] = w_dec[fires.any(0)]
    for seed in found:
        others = [rows[other] for other in rows if other != seed]
        pairs = [recovery.returning(rows[seed], other, true) for other in others]
        found[seed] |= {name: _mean([p[name] for p in pairs]) for name in pairs[0]}
    return {str(seed): measures for seed, measures in found.items()}


def run(study: Study) -> Section:
    """Trains and measures what is not there, and compares."""
    parts: list[Any] = [_setting(study)]
    for way in WAYS:
        results = {
            case.variant: measured(case) for case in cases(study) if case.way == way
        }
        panels = {}
        for norm in Case(study, way, "").norms:
            found = {v: _seeds_of(r, norm) for v, r in results.items()}
            panels[f"norm {norm:g}"] = found
            parts.append(
                f"Features that fire {in_words(way)}, norm {norm:g}, mean ± sd:"
            )
            parts.append(_table(study, results, found, norm))
            pairs = {a: b for a, b in TWINS.items() if found.get(a) and found.get(b)}
            effects = {f"{a} - {b}": compare(found, a, b) for a, b in pairs.items()}
            names = {name: MEASURES[name] for name in next(iter(effects.values()), {})}
            parts.append("Variational twins, paired over seeds, 95 % intervals:")
            parts.append(effects_table(effects, names))
        drawn = figure(panels, f"features that fire {in_words(way)}")
        parts.insert(1, study.save(f"family_{way}", drawn))
    return Section(
        "Every variant on known features",
        "sampling creates a dispersive pressure that organises features and keeps them "
        "from overlapping",
        "no test against known features",
        parts,
    )


def _table(
    study: Study, results: Mapping[str, Any], found: Found, norm: float
) -> Table:
    """A row a variant: what was chosen, its measures, and whether latents return."""
    k = study.scale.family.truth.active
    names = {"explained_variance": "expl. var."} | MEASURES | STABILITY
    table = [["variant", "lr", "weight", "seeds", "L0", *names.values()]]
    for variant, seeds in found.items():
        (choice,) = (
            Choice(Setting(*c[:3]), *c[3:])
            for c in results[variant]["chosen"]
            if c[0] == norm
        )
        l0 = list(of(seeds, "l0").values())
        off = "" if _distance(statistics.fmean(l0), k) <= TOLERANCE else " (off)"
        cells = [series.spread(list(of(seeds, n).values()), digits=3) for n in names]
        lr, weight = choice.setting.lr, choice.setting.weight
        rate = f"{lr:.2g}" if choice.inside else f"{lr:.2g} (an end)"
        chosen = [rate, f"{weight:.3g}" if weight else "-", str(len(seeds))]
        table.append([variant, *chosen, series.spread(l0, digits=1) + off, *cells])
    return table


def _setting(study: Study) -> str:
    f = study.scale.family
    t = f.truth
    return (
        f"{t.n_features} random directions in {t.d_model} dimensions, {t.active} on a "
        f"row in the mean, alone or in groups of {t.group}; {t.n_rows:,} rows. d_sae "
        f"{t.n_features}, L0 {t.active} (off: further from it than "
        f"{100 * TOLERANCE:g} %), {t.steps} steps of {t.batch_size} rows, seeds 0 to "
        f"{t.seeds - 1}, AuxK off, else the preset of the paper. Learning rates tried "
        f"first: {', '.join(f'{lr:g}' for lr in f.lrs)}, on rows and a seed of their "
        "own; weight: of the L1 penalty, in norms of a row. Measured on "
        f"{ROWS:,} fresh rows. Recovered, true: cosine > {recovery.FOUND} with a "
        "feature; returns: cosine > 0.7 with the latent of another seed that it is "
        "matched with, one to one, mean over the other seeds."
    )


def _seeds_of(result: Mapping[str, Any], norm: float) -> dict[int, dict[str, float]]:
    return {int(seed): m for seed, m in result["arms"][f"{norm:g}"].items()}


def _opened(folder: Path) -> runs.TrainedSAE | None:
    """A finished arm; None of one that diverged."""
    if (folder / runs.DIVERGED).is_file():
        return None
    return runs.open_run(folder)


def _name(setting: Setting, seed: int) -> str:
    norm, lr, weight = (f"{x:.4g}" for x in setting)
    return f"norm-{norm}_lr-{lr}_weight-{weight}_seed-{seed}"


def _distance(l0: float, k: float) -> float:
    """How far an L0 is from k, of either: 0.1 is 10 %."""
    return abs(math.log(max(l0, 1e-6) / k))


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def _seeds(study: Study) -> range:
    return range(study.scale.family.truth.seeds)


def rows_path(study: Study, way: str) -> Path:
    """Where the rows of a way are."""
    return study.out / "rows" / f"family-{way}"


def write_rows(study: Study, way: str) -> None:
    """Writes them where they are not there."""
    truth = study.scale.family.truth
    synthetic.write(rows_path(study, way), truth, correlated=WAYS[way])


@dataclass(frozen=True)
class FamilyConfig:
    """Trains and measures some variants on known features."""

    scale: ScaleName = flag("how large", "smoke")
    out: str = flag("folder of the study", "")
    variants: str = flag("comma list, or none: rows alone; unset: all", "")


def command(configs: Sequence[FamilyConfig]) -> None:
    """Writes the rows, then one file a variant and way."""
    (c,) = configs
    variants = c.variants.split(",") if c.variants else []
    for name in variants:
        if name not in (*VARIANTS, "none"):
            there = ", ".join(VARIANTS)
            raise UserError(f"--variants={name} is not a variant; there is {there}")
    study = Study(SCALES[c.scale], Path(c.out or f"experiments/results/{c.scale}"), {})
    for way in WAYS:
        write_rows(study, way)
    for case in cases(study, variants) if c.variants != "none" else []:
        measured(case)
        say(f"wrote {case.file}")


if __name__ == "__main__":
    cli.main(command, FamilyConfig)
