"""The paper's comparison, TopK against vSAE over k, under both presets.

`paper` is the paper's text, `released` the code that made its numbers
(docs/paper_and_code.md 2). The figures of the paper are drawn from these grids; the
text evaluations use the study's labelled texts.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.ablation import pick
from experiments.paired import Interval, difference, over_probes
from experiments.report import Section
from experiments.scales import Figures
from experiments.study import Arms, Study
from vsae_jax.config import Preset, TrainConfig, Variant
from vsae_jax.runs.series import Arm

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PRESETS: tuple[Preset, ...] = ("paper", "released")
VARIANTS: tuple[Variant, ...] = ("topk", "vsae_topk")
TEXT_EVALS = "sparse_probing,scr,tpp"
NOISE = (
    "standard deviations of these differences over training seeds (of means over probe "
    "seeds) / over the probe seeds of one training seed"
)


def grids(study: Study) -> dict[str, Arms]:
    """One grid for each preset and layer."""
    return {
        f"{preset}-{layer}": _arms(study, preset, layer)
        for preset in PRESETS
        for layer in study.scale.figures.layers or study.scale.text.layers
    }


def _arms(study: Study, preset: Preset, layer: int) -> Arms:
    f = study.scale.figures
    arms = {}
    for variant in VARIANTS:
        for k in (preset == "released" and f.released_k) or f.k:
            for d_sae in f.d_sae:
                size = f"d_sae-{d_sae}_" if len(f.d_sae) > 1 else ""
                for seed in range(f.seeds):
                    name = f"variant-{variant}_k-{k}_{size}seed-{seed}"
                    arms[name] = TrainConfig(
                        activations=str(study.rows_path(preset, layer)),
                        max_norm_multiple=study.scale.text.max_norm_multiple,
                        dtype=study.scale.dtype,
                        preset=preset,
                        variant=variant,
                        k=k,
                        seed=seed,
                        **_size(f, preset, d_sae),
                    )
    return arms


def _size(f: Figures, preset: Preset, d_sae: int) -> dict[str, int]:
    """The scale's dictionary and budget, or those of the released code itself."""
    if preset == "released" and f.released_to_the_letter:
        return {}
    return {"d_sae": d_sae, "steps": f.steps, "batch_size": f.batch_size}


def trained(study: Study, *evals: str) -> list[str]:
    """Trains the grids and makes these evaluations; returns the names of those that
    have the first of them, or any arm."""
    made = grids(study)
    for name, arms in made.items():
        preset, layer = name.rsplit("-", 1)
        study.rows(preset, int(layer))
        study.train(name, arms)
        for each in evals:
            study.evaluate(name, each)
    return [
        name
        for name in made
        if (is_evaluated(study, name, evals[0]) if evals else study.arms(name))
    ]


def is_evaluated(study: Study, name: str, evals: str) -> bool:
    """Whether both variants of a grid have an evaluation."""
    found = study.metrics(name, evals) if study.arms(name) else {}
    starts = [f"variant-{variant}_" for variant in VARIANTS]
    return all(any(kind.startswith(start) for kind in found) for start in starts)


def with_first_k(study: Study, name: str) -> list[Arm]:
    """The arms of a grid with the smallest k and d_sae."""
    f = study.scale.figures
    wanted = {"k": f.k[0]} | ({"d_sae": f.d_sae[0]} if len(f.d_sae) > 1 else {})
    return [
        arm
        for arm in study.arms(name)
        if all(arm.settings.get(n, v) == v for n, v in wanted.items())
    ]


def draw(
    study: Study,
    names: Sequence[str],
    figure: Callable[[Sequence[Arm]], "Iterator[tuple[str, Figure]]"],
    *,
    label: str,
    arms: Callable[[str], list[Arm]],
    kind: str = "svg",
) -> list[Path]:
    """A figure of `vsae_jax.figures` for each grid."""
    from vsae_jax.report.figures import style

    paths = []
    for name in names:
        with style.applied():
            drawn = list(figure(arms(name)))
        for i, (_, made) in enumerate(drawn):
            number = f"_{i + 1}" if len(drawn) > 1 else ""
            style.title(made, f"preset and layer: {name}")
            paths.append(study.save(f"{label}_{name}{number}", made, kind=kind))
    return paths


def vsae_minus_topk(
    study: Study, name: str, measure: str, evals: str = "core", *, k: int | None = None
) -> Interval:
    """Paired over seeds; the mean over k (unless one is given) and d_sae within a
    seed."""

    def of(probe: int | None) -> Interval:
        found = study.metrics(name, evals, probe)
        if k is not None:
            found = {n: seeds for n, seeds in found.items() if f"_k-{k}_" in f"{n}_"}
        return difference(*(over_kinds(found, v, measure) for v in VARIANTS[::-1]))

    return over_probes(of, study.probes(name, evals))


def over_kinds(
    found: Mapping[str, Mapping[int, Any]], variant: str, measure: str
) -> dict[int, float]:
    """The mean of a measure over a variant's kinds of arms, by seed; of a kind (a k)
    that the other variant has, too."""
    start = f"variant-{variant}_"
    (other,) = (f"variant-{v}_" for v in VARIANTS if v != variant)
    each = [
        pick(seeds, measure)
        for kind, seeds in found.items()
        if kind.startswith(start) and other + kind.removeprefix(start) in found
    ]
    seeds = set.intersection(*(set(values) for values in each)) if each else set()
    return {s: sum(values[s] for values in each) / len(each) for s in sorted(seeds)}


def difference_table(
    study: Study, names: Sequence[str], measures: Mapping[str, str], evals: str
) -> tuple[str, list[list[str]]]:
    """vSAE - TopK of each grid, the mean over k and each k; and what of the mean is
    noise of the training and of the probes, where there are several of both. What it
    says, and the table."""
    header = ["preset and layer", *measures.values()]
    found = {
        name: [vsae_minus_topk(study, name, m, evals) for m in measures]
        for name in names
    }
    rows, noisy = [header], any(i.noise for each in found.values() for i in each)
    for name, each in found.items():
        n = min(i.n for i in each)
        fewer = f" (seeds: {n})" if n < study.scale.figures.seeds else ""
        rows.append([name + fewer, *map(str, each)])
        if noisy:
            rows.append(["sd", *(i.noise or "-" for i in each)])
        for k in _several_k(study, name, evals):
            of_k = [vsae_minus_topk(study, name, m, evals, k=k) for m in measures]
            rows.append([f"{name}, k {k}", *map(str, of_k)])
    said = "vSAE - TopK, mean over k, paired over seeds, 95 % intervals"
    return (f"{said}; sd: {NOISE}:" if noisy else f"{said}:"), rows


def _several_k(study: Study, name: str, evals: str) -> list[int]:
    """The k that a grid's arms with these evaluations have, where there are several."""
    found = study.metrics(name, evals)
    ks = [k for k in study.scale.figures.k if any(f"_k-{k}_" in f"{n}_" for n in found)]
    return ks if len(ks) > 1 else []


def lines_section(
    study: Study,
    part: str,
    *,
    figure: str,
    evals: str,
    measures: Mapping[str, str],
    **facts: str,
) -> Section:
    """The section of a figure of `vsae_jax.figures.lines`, with its differences."""
    from vsae_jax.report.figures import lines

    names = trained(study, evals)
    drawn = draw(study, names, partial(lines.draw, figure), label=part, arms=study.arms)
    table = difference_table(study, names, measures, figure)
    return Section(parts=[*drawn, *table], **facts)
