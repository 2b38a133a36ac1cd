"""Does sampling make latents reproducible: do they come back with another seed?

Two TopK autoencoders that differ in their seeds alone share about a third of their
latents (Paulo and Belrose, arXiv 2501.16615). Here every kind of arm is trained from
several seeds, and the latents of every two runs are paired one to one
(`evaluate --evals=stability`).

The primary outcome (experiments.primary): the share of the latents whose decoder row
has a cosine above 0.7 with its partner's, vSAE against TopK at the same d_sae, k and
budget. What could explain it away stands beside it: the price in explained variance
(TopK over k), the number of alive latents (TopK with fewer), the training length, the
learning rate (each kind has its own best), beta, noise, relu and penalty one by one,
another block, massive rows, and directions that crowd.

Command:

    python -m experiments.reproduce --scale=real --model=DIR --dataset=FILE \
        --only=stability

The paper has no such test.
"""

import statistics
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from experiments import ablation
from experiments.paired import Interval, difference
from experiments.report import Section, Table
from experiments.study import Arms, Study
from vsae_jax.config import TrainConfig
from vsae_jax.runs import series

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TUNING, GRID, LENGTHS = "stability_tuning", "stability", "stability_lengths"
PRIMARY = "decoder_cosine_above_0.7"
EVALS = ("stability", "predictability")
# Measure -> how a table calls it.
MEASURES = {
    "explained_variance": "expl. var.",
    "explained_variance_standardised": "standardised",
    "alive": "fire 20 times",
    "latents_that_return": "latents that return",
    PRIMARY: "share that returns",
    "decoder_cosine_median": "median cosine",
    "both_above_0.7": "encoder too",
    "correlation_above_0.7": "by correlation",
    "activation_in_returning": "of activation",
    "nearest_within_run_median": "nearest within a run",
    "auc_by_bigram_median": "tokens tell",
}
# What explains less (of standardised rows, ReLU does) would leave no room for others.
_LEAST = -1
# In the name of a kind: trained on other rows, or for longer.
_ELSEWHERE = ("_all-rows", "_layer-", "_steps-")
# Shown beside the plain ReLU autoencoders.
_COMPARED = ("vsae", "vsae_relu", "topk_k-16", "topk_l1")
_FAMILIES = {"topk": "o", "vsae": "s", "relu": "^", "batch": "D"}


def kinds(study: Study) -> dict[str, dict[str, Any]]:
    """Kinds of arms beside those of the ablation."""
    s, common = study.scale.stability, ablation.common(study)
    topk, vsae = (ablation.KINDS[name] for name in ("topk", "vsae"))
    found: dict[str, dict[str, Any]] = {
        f"vsae_noise-{std:g}": vsae | {"noise_std": std} for std in s.noises
    }
    for at in s.noise_at:
        for name, fields in (("topk", topk), ("vsae", vsae)):
            found[f"{name}_noise-{at}"] = fields | {"noise_std": 1.0, "noise_at": at}
    for share in s.l1:
        found[f"relu_l1-{share:g}"] = {
            "variant": "relu",
            "l1": share * common["input_scale"],
        }
    if s.batch_topk:
        found["batch_topk"] = {"variant": "batch_topk", "auxk": 0.0}
        found["batch_vsae"] = {"variant": "vsae_batch_topk", "beta": 0.1}
    if study.scale.text.max_norm_multiple is not None:
        for name, fields in (("topk", topk), ("vsae", vsae)):
            found[f"{name}_all-rows"] = fields | {"max_norm_multiple": None}
    for layer in study.scale.text.layers[1:]:
        place = {"activations": str(study.rows_path("paper", layer))}
        for name, fields in _main(study).items():
            found[f"{name}_layer-{layer}"] = fields | place
    return found


def _main(study: Study) -> dict[str, dict[str, Any]]:
    """The main arms, which are tried at other blocks and lengths too."""
    of_ablation = ablation.kinds(study)
    return {name: of_ablation[name] for name in ablation.MAIN if name in of_ablation}


def grids(study: Study) -> dict[str, Arms]:
    """Those of the ablation, and its own."""
    own = ablation.tuned(study, kinds(study), TUNING, GRID) if kinds(study) else {}
    lengths = {LENGTHS: _lengths(study)} if study.scale.stability.lengths else {}
    return ablation.grids(study) | own | lengths


def _lengths(study: Study) -> Arms:
    """The main arms, trained for longer and shorter."""
    shared, rates = ablation.common(study), ablation.best_rates(study)
    c, s = study.scale.controlled, study.scale.stability
    return {
        f"{kind}_steps-{steps}_seed-{seed}": TrainConfig(
            **shared
            | fields
            | {"steps": steps, "checkpoint_every": steps, "log_every": steps // 4}
            | {"lr": rates.get(kind, c.lrs[0]), "seed": seed}
        )
        for kind, fields in _main(study).items()
        for steps in s.lengths
        for seed in range(c.seeds)
    }


def trained(study: Study) -> list[str]:
    """Trains what is missing and evaluates it, one grid after the other; returns the
    grids' names."""
    s = study.scale.stability
    names = [ablation.GRID]
    study.rows("paper", study.layer)
    ablation.trained(study, ablation.kinds(study), ablation.TUNING, ablation.GRID)
    _evaluate(study, ablation.GRID)
    if kinds(study):
        for layer in study.scale.text.layers[1:]:
            study.rows("paper", layer)
        ablation.trained(study, kinds(study), TUNING, GRID)
        _evaluate(study, GRID)
        names.append(GRID)
    if s.lengths:
        study.train(LENGTHS, _lengths(study))
        study.evaluate(LENGTHS, "core")
        _evaluate(study, LENGTHS)
        names.append(LENGTHS)
    return names


def _evaluate(study: Study, grid: str) -> None:
    for each in EVALS:
        study.evaluate(grid, each, num_tokens=study.scale.stability.tokens)


def run(study: Study) -> Section:
    """The table of kinds, what the primary outcome says, and its price as a figure."""
    found = {
        kind: seeds
        for kind, seeds in measured(study, trained(study)).items()
        if ablation.pick(seeds, PRIMARY)
    }
    parts = (
        [
            _setting(study, found),
            "Share that returns, mean ± standard deviation over seeds; the first row "
            "is the primary outcome:",
            _verdict(found),
            _switches(found),
            study.save("stability_price", draw(found)),
            _table(found),
        ]
        if {"topk", "vsae"} <= found.keys()
        else ["TopK and the vSAE are not evaluated yet."]
    )
    return Section(
        "Do latents come back with another seed?",
        "sampling organises latents (Baker and Li 1.1, 2.3)",
        "no comparison of seeds",
        parts,
    )


def measured(
    study: Study, names: list[str]
) -> dict[str, dict[int, Mapping[str, float | None]]]:
    """Each kind of arm of these grids: its metrics by seed."""
    found: dict[str, dict[int, Any]] = {}
    for name in names:
        found |= study.metrics(name, ",".join(("core", *EVALS)))
    return found


def _mean(seeds: Mapping[int, Mapping[str, Any]], measure: str) -> float | None:
    values = list(ablation.pick(seeds, measure).values())
    return statistics.fmean(values) if values else None


def _effect(found: Mapping[str, Any], kind: str, base: str) -> Interval:
    """Of the primary outcome, over seeds."""
    return difference(*(ablation.pick(found[n], PRIMARY) for n in (kind, base)))


def _setting(study: Study, found: Mapping[str, Any]) -> str:
    c = study.scale.controlled
    chance = _mean(found["topk"], "decoder_cosine_by_chance_median")
    return (
        f"Every two of {c.main_seeds or c.seeds} seeds (kinds beside the main ones: "
        f"{c.seeds}), latents that fire 20 times or more on "
        f"{study.scale.stability.tokens:,} held-out tokens, paired one to one by the "
        f"cosine of their decoder rows. By chance the median cosine of a pair is "
        f"{chance:.2f}. A run's number is the mean over its pairs, an interval is over "
        "runs, which share pairs: it is narrower than independent pairs would make it."
        if chance is not None
        else "No pairs."
    )


def _settings(found: Mapping[str, Any]) -> list[str]:
    """The ends of kinds' names that say where a vSAE and a TopK are alike."""
    ends = [kind.removeprefix("vsae") for kind in found if kind.startswith("vsae")]
    return [end for end in ends if f"topk{end}" in found]


def _verdict(found: Mapping[str, Any]) -> Table:
    """The primary outcome and its like in every setting, the vSAE beside TopK and
    beside a TopK of fewer latents a row."""
    bases = [kind for kind in ablation.MAIN if kind != "vsae"]
    rows = [["setting", *(bases), "vsae", *(f"vsae - {base}" for base in bases)]]
    for end in _settings(found):
        kinds = [base + end for base in bases]
        effects = [
            str(_effect(found, f"vsae{end}", kind)) if kind in found else "-"
            for kind in kinds
        ]
        cells = [_cell(found.get(k, {}), PRIMARY, 3) for k in (*kinds, f"vsae{end}")]
        rows.append([end.strip("_") or "of the ablation", *cells, *effects])
    return rows


def _switches(found: Mapping[str, Any]) -> str:
    """The same outcome, each switch against its base."""
    lines = []
    for base in ("topk", "vsae"):
        effects = {
            kind: _effect(found, kind, base)
            for kind in found
            if kind.startswith(f"{base}_") and not any(e in kind for e in _ELSEWHERE)
        }
        ranked = sorted(effects.items(), key=lambda item: -item[1].mean)
        named = "; ".join(f"{kind} {e}" for kind, e in ranked)
        lines.append(f"Against `{base}`: {named or 'nothing'}.")
    beside = "; ".join(
        f"{kind} {_cell(seeds, PRIMARY, 3)} at {_cell(seeds, 'explained_variance', 3)}"
        for kind, seeds in found.items()
        if kind.startswith("relu_") or kind in _COMPARED
    )
    lines.append(f"The vSAE and its rivals, each at its explained variance: {beside}.")
    return "\n\n".join(lines)


def _cell(seeds: Mapping[int, Any], measure: str, digits: int) -> str:
    """The mean over seeds and, where there are several, the standard deviation."""
    return series.spread(list(ablation.pick(seeds, measure).values()), digits=digits)


def _table(found: Mapping[str, Any]) -> Table:
    rows = [["arm", "seeds", *MEASURES.values()]]
    for kind, seeds in found.items():
        cells = [
            _cell(seeds, m, 0 if m in ("alive", "latents_that_return") else 3)
            for m in MEASURES
        ]
        rows.append([kind, str(len(seeds)), *cells])
    return rows


def draw(found: Mapping[str, Any]) -> "Figure":
    """Each kind of arm by explained variance and by the latents that return."""
    from vsae_jax.report.figures import style

    with style.applied():
        figure = style.figure(9, 4.2)
        for ax, x in zip(
            figure.subplots(1, 2),
            ("explained_variance", "explained_variance_standardised"),
            strict=True,
        ):
            for kind, seeds in found.items():
                at = _mean(seeds, x), _mean(seeds, "latents_that_return")
                elsewhere = any(end in kind for end in _ELSEWHERE)
                if elsewhere or None in at or at[0] < _LEAST:
                    continue
                family = kind.split("_", 1)[0]
                colour = style.VERMILLION if family == "vsae" else style.GREY
                mark = _FAMILIES.get(family, "o")
                ax.plot(*at, mark, color=colour, markersize=4)
                ax.annotate(
                    kind, at, fontsize=5, xytext=(3, 2), textcoords="offset points"
                )
            ax.set_xlabel(f"{MEASURES[x]} (better →)")
        figure.axes[0].set_ylabel("latents that return (better ↑)")
        style.caption(
            figure,
            "Latents of one run whose decoder row has a cosine above 0.7 with its "
            "partner's in a run of another seed; means over pairs of seeds. Kinds that "
            f"explain less than {_LEAST:g}, or had other rows or another length, are "
            "not shown.",
        )
    return figure
