"""One switch at a time: what does each part of the paper's model do?

Claim (Baker and Li 4.1, 5): the KL term kills features, and the variational method
makes what is left more independent. The released comparison changed noise, ReLU,
decoder norm, learning rate, centring and AuxK together (docs/paper_and_code.md 3). Here
arms have the same rows, initial weights and schedule, and differ from `topk` or from
`vsae` in one switch; each kind has the best of the same learning rates, found on a seed
of its own.

Command:

    python -m experiments.reproduce --scale=standin --only=ablation --out=DIR

The paper has no such table. What was found is in experiments/results/standin/report.md.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from experiments import signal_to_noise
from experiments.effects import MEASURES, effects_figure, effects_table
from experiments.paired import Interval, difference
from experiments.report import Filed, Section
from experiments.study import Arms, Study
from vsae_jax.config import TrainConfig
from vsae_jax.runs import series

TUNING, GRID = "tuning", "ablation"
# TopK, a TopK that reconstructs no better than the vSAE, and the vSAE.
MAIN = ("topk", "topk_k-16", "vsae")
# The seed of the search for a learning rate; the arms have others.
_TUNING_SEED = 1000

_TOPK: dict[str, Any] = {"variant": "topk", "auxk": 0.0}
_VSAE: dict[str, Any] = {"variant": "vsae_topk", "beta": 0.1}
_AUXK = {"auxk": 1 / 32}
_KL = {"penalty": "kl", "beta": 0.1}
# Kind of arm -> what differs from the preset `paper`. `topk` and `vsae` are what the
# others of their name are compared with.
KINDS: dict[str, dict[str, Any]] = {
    "topk": _TOPK,
    "topk_noise": _TOPK | {"noise_std": 1.0},
    "topk_learned": _TOPK | {"noise_std": 1.0, "variance": "learned"},
    "topk_no_relu": _TOPK | {"relu": False},
    "topk_free": _TOPK | {"decoder_norm": "free"},
    "topk_auxk": _TOPK | _AUXK,
    "topk_kl": _TOPK | _KL,
    "topk_kl_selected": _TOPK | _KL | {"kl_over": "selected"},
    "topk_l1": _TOPK | {"penalty": "l1"},
    "vsae": _VSAE,
    "vsae_no_noise": _VSAE | {"noise_std": 0.0},
    "vsae_learned": _VSAE | {"variance": "learned"},
    "vsae_relu": _VSAE | {"relu": True},
    "vsae_free": _VSAE | {"decoder_norm": "free"},
    "vsae_auxk": _VSAE | _AUXK,
    "vsae_no_penalty": _VSAE | {"penalty": "none"},
    "vsae_kl_selected": _VSAE | {"kl_over": "selected"},
    "vsae_l1": _VSAE | {"penalty": "l1"},
    "vsae_beta-0.0001": _VSAE | {"beta": 1e-4},
    "vsae_beta-0.01": _VSAE | {"beta": 0.01},
    "vsae_beta-0.5": _VSAE | {"beta": 0.5},
    "vsae_beta-1": _VSAE | {"beta": 1.0},
}


def configured(kind: str, **fields: Any) -> TrainConfig:
    """The config of a kind of arm; `fields` are further ones, and go first."""
    return TrainConfig(**(KINDS[kind] | fields))


def kinds(study: Study) -> dict[str, dict[str, Any]]:
    """All kinds of arms at this scale: the switches, other k, and TopK with fewer
    latents."""
    c = study.scale.controlled
    both = {"topk": _TOPK, "vsae": _VSAE}
    other_k = {
        f"{name}_k-{k}": fields | {"k": k}
        for name, fields in both.items()
        for k in c.other_k
    }
    smaller = {f"topk_d-{d}": _TOPK | {"d_sae": d, "k": min(c.k, d)} for d in c.smaller}
    main = {kind: KINDS[kind] for kind in c.kinds or KINDS}
    return main | other_k | smaller


def common(study: Study) -> dict[str, Any]:
    """The fields that all arms at the recommended scale share."""
    c = study.scale.controlled
    norm = signal_to_noise.recommended(study)
    return {
        "activations": str(study.rows_path("paper", study.layer)),
        "max_norm_multiple": study.scale.text.max_norm_multiple,
        "d_sae": c.d_sae,
        "k": c.k,
        "steps": c.steps,
        "batch_size": c.batch_size,
        "dtype": study.scale.dtype,
        "input_scale": norm,
        # As much of the loss as the 5.0 of `relu` at scale 100.
        "l1": 0.05 * norm,
        "checkpoint_every": max(c.steps // 4, 1),
        "log_every": max(c.steps // 4, 1),
    }


def grids(study: Study) -> dict[str, Arms]:
    """The search for learning rates, and the arms with what it found."""
    return tuned(study, kinds(study), TUNING, GRID)


def tuned(
    study: Study, of: Mapping[str, Mapping[str, Any]], tuning: str, grid: str
) -> dict[str, Arms]:
    """Two grids of these kinds of arms: of the search for learning rates (none where
    there is one rate), and of the arms of every seed with what it found."""
    c, shared = study.scale.controlled, common(study)
    rates = best_rates(study, of, tuning)
    search = {
        f"{kind}_lr-{lr:g}_seed-{_TUNING_SEED}": TrainConfig(
            **(shared | {"steps": c.tuning_steps or c.steps})
            | fields
            | {"lr": lr, "seed": _TUNING_SEED}
        )
        for kind, fields in of.items()
        for lr in c.lrs
    }
    arms = {
        f"{kind}_seed-{seed}": TrainConfig(
            **(shared | fields | {"lr": rates.get(kind, c.lrs[0]), "seed": seed})
        )
        for kind, fields in of.items()
        for seed in range((kind in MAIN and c.main_seeds) or c.seeds)
    }
    return ({tuning: search} if len(c.lrs) > 1 else {}) | {grid: arms}


def best_rates(
    study: Study,
    of: Mapping[str, Mapping[str, Any]] | None = None,
    tuning: str = TUNING,
) -> dict[str, float]:
    """Of each kind (unset: those of the ablation) the learning rate with the best
    explained variance on text that nothing else is evaluated on, where the scale sets
    some aside; else on held-out rows. Empty before the search."""
    lrs = study.scale.controlled.lrs
    if len(lrs) == 1:
        given = study.scale.controlled.rates
        of = kinds(study) if of is None else of
        return {kind: given.get(kind, lrs[0]) for kind in of}
    if not (study.grid(tuning) / "grid.json").is_file():
        return {}
    best: dict[str, tuple[float, float]] = {}
    for name, seeds in study.metrics(tuning).items():
        kind, rate = name.rsplit("_lr-", 1)
        found = seeds[_TUNING_SEED]["explained_variance"], float(rate)
        best[kind] = max(best.get(kind, (-math.inf, 0.0)), found)
    return {kind: rate for kind, (_, rate) in best.items()}


def trained(
    study: Study, of: Mapping[str, Mapping[str, Any]], tuning: str, grid: str
) -> None:
    """Searches the rates of these kinds, trains their arms, and evaluates both."""
    if tuning in (search := tuned(study, of, tuning, grid)):
        study.train(tuning, search[tuning])
        study.evaluate(tuning, "core", text=study.tuning_text())
    study.train(grid, tuned(study, of, tuning, grid)[grid])
    study.evaluate(grid, "core")


def measured(study: Study) -> dict[str, dict[int, Any]]:
    """Trains and evaluates what is missing; returns each kind's metrics by seed."""
    study.rows("paper", study.layer)
    if not study.scale.controlled.norm:
        signal_to_noise.measured(study)
    trained(study, kinds(study), TUNING, GRID)
    study.evaluate(GRID, "scr,tpp")
    return study.of_kinds(("topk", "vsae"), GRID, "core,scr,tpp")


def run(study: Study) -> Section:
    """Every switch against its base, as a table and as a figure."""
    found = measured(study)
    effects = {name: of_switches(found, name) for name in ("topk", "vsae")}
    effects["topk"]["vsae"] = against(found["vsae"], found["topk"])
    parts: list[Any] = [_setting(study)]
    for name, of_name in effects.items():
        parts.append(f"Differences to `{name}`, paired over seeds, 95 % intervals:")
        parts.append(effects_table(of_name))
        parts.append(
            study.save(f"ablation_{name}", effects_figure(of_name, f"against {name}"))
        )
    parts.append("All arms, mean ± standard deviation over seeds:")
    parts.append(Filed(_values(study, found)))
    return Section(
        "One switch at a time",
        "the KL term kills features; the variational method makes features more "
        "independent (SCR, TPP)",
        "no ablation; the compared models differed in at least six things",
        parts,
    )


def of_switches(
    found: Mapping[str, Mapping[int, Mapping[str, Any]]], name: str
) -> dict[str, dict[str, Interval]]:
    """Each kind of arm of that name: the difference to the plain one, by measure."""
    others = {k: v for k, v in found.items() if k.startswith(f"{name}_")}
    return {kind: against(seeds, found[name]) for kind, seeds in others.items()}


def against(
    seeds: Mapping[int, Any],
    base: Mapping[int, Any],
    measures: Iterable[str] = MEASURES,
) -> dict[str, Interval]:
    """Each measure's difference, paired over seeds; without those that lack them."""
    picked = {m: (pick(seeds, m), pick(base, m)) for m in measures}
    return {m: difference(a, b) for m, (a, b) in picked.items() if a.keys() & b.keys()}


def pick(seeds: Mapping[int, Mapping[str, Any]], measure: str) -> dict[int, float]:
    """A measure by seed; seeds without it are left out."""
    values = {seed: metrics.get(measure) for seed, metrics in seeds.items()}
    return {seed: value for seed, value in values.items() if value is not None}


def _setting(study: Study) -> str:
    c, rates = study.scale.controlled, best_rates(study)
    largest, least = (
        sum(rate == edge(c.lrs) for rate in rates.values()) for edge in (max, min)
    )
    tried = (
        f"Learning rates tried for every kind: {', '.join(f'{r:g}' for r in c.lrs)}; "
        f"the largest was the best of {largest}, the least of {least} of {len(rates)} "
        "kinds."
        if len(c.lrs) > 1
        else "Learning rates: as given, in the table."
    )
    return (
        f"d_sae {c.d_sae}, k {c.k}, {c.steps} steps of {c.batch_size} rows, root mean "
        f"square row norm {signal_to_noise.recommended(study):g}, seeds 0 to "
        f"{c.seeds - 1} (main arms: to {(c.main_seeds or c.seeds) - 1}); evaluated at "
        f"the mean on {study.scale.eval_tokens:,} held-out tokens. SCR and TPP are "
        "means over 2, 5, 10, 20 and 50 ablated latents. "
        f"{tried}"
    )


def _values(study: Study, found: Mapping[str, Mapping[int, Any]]) -> list[list[str]]:
    rates = best_rates(study)
    header = ["arm", "lr", "seeds", *MEASURES.values()]
    rows = [
        [
            kind,
            f"{rates[kind]:g}" if kind in rates else "-",
            str(len(seeds)),
            *(series.spread(list(pick(seeds, m).values())) for m in MEASURES),
        ]
        for kind, seeds in found.items()
    ]
    return [header, *rows]
