"""The full cross of the switches: does an effect depend on the others?

noise {0, 1, learned} x relu(mu) {on, off} x decoder {unit, free} x AuxK {off, on} x
penalty {none, KL on all, KL on selected, L1}, short runs, one learning rate. A switch's
main effect is the difference between its two values, averaged over all settings of the
others within a seed, and paired over seeds.

Command:

    python -m experiments.reproduce --scale=standin --only=cross --out=DIR

The paper has no such table. What was found is in docs/results.md.
"""

import itertools
import statistics
from collections.abc import Mapping
from typing import Any

from experiments import ablation
from experiments.effects import MEASURES, effects_figure, effects_table
from experiments.paired import Interval, difference
from experiments.report import Section, Table
from experiments.study import Arms, Study
from vsae_jax import runs
from vsae_jax.config import TrainConfig

GRID = "cross"
# Switch -> value -> fields; the first value is what the others are compared with.
SWITCHES: dict[str, dict[str, dict[str, Any]]] = {
    "noise": {
        "0": {"noise_std": 0.0},
        "1": {"noise_std": 1.0},
        "learned": {"noise_std": 1.0, "variance": "learned"},
    },
    "relu": {"on": {"relu": True}, "off": {"relu": False}},
    "decoder": {"unit": {"decoder_norm": "unit"}, "free": {"decoder_norm": "free"}},
    "auxk": {"off": {"auxk": 0.0}, "on": {"auxk": 1 / 32}},
    "penalty": {
        "none": {"penalty": "none"},
        "kl": {"penalty": "kl", "beta": 0.1},
        "selected": {"penalty": "kl", "beta": 0.1, "kl_over": "selected"},
        "l1": {"penalty": "l1"},
    },
}
_SHOWN = {
    name: MEASURES[name]
    for name in ("alive", "entropy_effective_latents", "explained_variance")
} | {"ce_loss_score": "loss recovered", "decoder_cosine": "nearest cosine"}
# How much noise does to the alive latents under each penalty, and the other way round.
_PAIRS = (("noise", "penalty"), ("penalty", "noise"), ("noise", "relu"))


def grids(study: Study) -> dict[str, Arms]:
    """Every combination, every seed."""
    c = study.scale.controlled
    rates = ablation.best_rates(study)
    shared: dict[str, Any] = ablation.common(study) | {
        "variant": "vsae_topk",
        "steps": c.cross_steps,
        "checkpoint_every": c.cross_steps,
        "log_every": max(c.cross_steps // 2, 1),
        "lr": rates.get("topk", c.lrs[0]),
    }
    arms = {}
    values_of = [v if n in c.crossed else list(v)[:1] for n, v in SWITCHES.items()]
    for values in itertools.product(*values_of):
        fields: dict[str, Any] = {}
        for of_switch, value in zip(SWITCHES.values(), values, strict=True):
            fields |= of_switch[value]
        name = "_".join(map("-".join, zip(SWITCHES, values, strict=True)))
        for seed in range(c.cross_seeds):
            arms[f"{name}_seed-{seed}"] = TrainConfig(**shared, **fields, seed=seed)
    return {GRID: arms}


def run(study: Study) -> Section:
    """Main effects, and how noise and penalty change each other's."""
    study.train(GRID, grids(study)[GRID])
    study.evaluate(GRID, "core")
    found = {
        tuple(part.split("-", 1)[1] for part in name.split("_")): seeds
        for name, seeds in study.metrics(GRID).items()
    }
    effects = main_effects(found)
    c = study.scale.controlled
    parts: list[Any] = [
        f"{len(found)} kinds of arms, {c.cross_seeds} seeds, {c.cross_steps} steps, "
        f"the learning rate of `topk`; {_diverged(study)}",
        effects_table(effects, _SHOWN),
        study.save("cross", effects_figure(effects, "of the switch", _SHOWN)),
        "Alive latents: the effect of one switch under each value of another.",
        _interactions(found),
    ]
    return Section(
        "The full cross",
        "none",
        "no such experiment",
        parts,
    )


def _diverged(study: Study) -> str:
    folders = [study.grid(GRID) / arm for arm in grids(study)[GRID]]
    missing = sum((folder / runs.DIVERGED).is_file() for folder in folders)
    return f"{missing} arms diverged and are left out."


Found = Mapping[tuple[str, ...], Mapping[int, Mapping[str, Any]]]


def main_effects(found: Found) -> dict[str, dict[str, Interval]]:
    """`noise 1`, ...: against the first value, over all settings of the others."""
    return {
        f"{switch} {value}": {m: effect(found, switch, value, m) for m in _SHOWN}
        for place, (switch, values) in enumerate(SWITCHES.items())
        for value in list(values)[1:]
        if any(setting[place] == value for setting in found)
    }


def effect(
    found: Found,
    switch: str,
    value: str,
    measure: str,
    where: Mapping[str, str] | None = None,
) -> Interval:
    """The mean over settings (those in `where`) of what `value` changes, by seed."""
    at, base = list(SWITCHES).index(switch), next(iter(SWITCHES[switch]))
    order = list(SWITCHES)
    by_seed: dict[int, list[float]] = {}
    for setting, seeds in found.items():
        other = (*setting[:at], base, *setting[at + 1 :])
        wanted = all(setting[order.index(n)] == v for n, v in (where or {}).items())
        if setting[at] != value or not wanted or other not in found:
            continue
        changed = ablation.pick(seeds, measure)
        before = ablation.pick(found[other], measure)
        for seed in changed.keys() & before.keys():
            by_seed.setdefault(seed, []).append(changed[seed] - before[seed])
    means = {seed: statistics.fmean(values) for seed, values in by_seed.items()}
    return difference(means, dict.fromkeys(means, 0.0))


def _interactions(found: Found) -> Table:
    rows = [["switch", "where", "alive latents"]]
    there = [set(values) for values in zip(*found, strict=True)]
    place = {name: i for i, name in enumerate(SWITCHES)}
    for switch, other in _PAIRS:
        for value in list(SWITCHES[switch])[1:]:
            for given in SWITCHES[other]:
                if value in there[place[switch]] and given in there[place[other]]:
                    change = effect(found, switch, value, "alive", {other: given})
                    rows.append([f"{switch} {value}", f"{other} {given}", str(change)])
    return rows
