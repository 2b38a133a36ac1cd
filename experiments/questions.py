"""The three questions that the study is for, answered from the other parts' grids.

What kills latents? Where does sampling at sigma = 1 train, and what does it do to the
latents there? Does anything variational beat TopK at equal L0 and training budget, and
at equal alive latents, and on which metric?

Command:

    python -m experiments.reproduce --scale=standin --only=questions --out=DIR

For equal alive latents an arm is compared, within its seed, with TopK arms of fewer
latents: their metric, linear in the logarithm of the alive latents between them.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from experiments import ablation, cross, signal_to_noise
from experiments.effects import MEASURES, effects_figure, effects_table
from experiments.paired import Interval, difference
from experiments.report import Section
from experiments.study import Arms, Study

# Measures of which more is better.
_BETTER = ("explained_variance", "ce_loss_score", "scr", "tpp")
_EQUAL_ALIVE = {name: MEASURES[name] for name in (*_BETTER, "decoder_cosine")}


def grids(study: Study) -> dict[str, Arms]:
    """Those of the parts that it reads."""
    return signal_to_noise.grids(study) | ablation.grids(study) | cross.grids(study)


def run(study: Study) -> Section:
    """Three answers, each with the numbers it follows from."""
    found = ablation.measured(study)
    same = {
        kind: ablation.against(found[kind], found["topk"])
        for kind in found
        if is_variational(kind)
    }
    equal = {kind: at_equal_alive(found, kind) for kind in same}
    figure = effects_figure(
        equal, "against TopK with as many alive latents", _EQUAL_ALIVE
    )
    parts: list[Any] = [
        "**1. What kills latents?** " + _what_kills(found),
        "**2. Where does a sampled vSAE train?** " + _where(study),
        "**3. Does anything variational beat TopK?** " + _what_beats(same, equal),
        "Against TopK with as many alive latents:",
        effects_table(equal, _EQUAL_ALIVE),
        study.save("equal_alive", figure),
    ]
    return Section(parts=parts, title="Three questions", claim="", paper="")


def is_variational(kind: str) -> bool:
    """Whether an arm of the ablation, at the common k, samples or has a KL penalty."""
    fields = ablation.KINDS.get(kind, {})
    noise, penalty = fields.get("noise_std"), fields.get("penalty")
    return kind in ablation.KINDS and bool(
        kind.startswith("vsae") or noise or penalty == "kl"
    )


def at_equal_alive(
    found: Mapping[str, Mapping[int, Any]], kind: str
) -> dict[str, Interval]:
    """The differences to TopK with as many alive latents."""
    sizes = [k for k in found if k == "topk" or k.startswith("topk_d-")]
    alive = ablation.pick(found[kind], "alive")
    result = {}
    for measure in _EQUAL_ALIVE:
        values = ablation.pick(found[kind], measure)
        there: dict[int, float] = {}
        for seed in values.keys() & alive.keys():
            points = sorted(
                (found[s][seed]["alive"], found[s][seed][measure])
                for s in sizes
                if found[s].get(seed, {}).get(measure) is not None
            )
            if points and points[0][0] <= alive[seed]:
                x, y = zip(*points, strict=True)
                there[seed] = float(np.interp(np.log(alive[seed]), np.log(x), y))
        if there:
            result[measure] = difference(values, there)
    return result


def _what_kills(found: Mapping[str, Mapping[int, Any]]) -> str:
    """Every switch whose interval of alive latents excludes 0, the worst first."""
    effects = {
        f"{kind} against {base}": by_measure["alive"]
        for base in ("topk", "vsae")
        for kind, by_measure in ablation.of_switches(found, base).items()
        if "_k-" not in kind and "_d-" not in kind and "alive" in by_measure
    }
    alive = {
        base: np.mean(list(ablation.pick(found[base], "alive").values()))
        for base in ("topk", "vsae")
    }
    lines = [f"Alive: `topk` {alive['topk']:.1f}, `vsae` {alive['vsae']:.1f}."]
    for word, sign in (("kill", -1), ("keep alive", 1)):
        named = [
            f"{name} {e}"
            for name, e in sorted(effects.items(), key=lambda item: item[1].mean)
            if e.sign == sign
        ]
        lines.append(f"Switches that {word}: {'; '.join(named) or 'none'}.")
    return " ".join(lines)


def _where(study: Study) -> str:
    found = signal_to_noise.cells(study)
    return signal_to_noise.near_topk(found) if found else "Not measured."


def _what_beats(
    same: Mapping[str, Mapping[str, Interval]],
    equal: Mapping[str, Mapping[str, Interval]],
) -> str:
    lines = []
    for where, effects in (("d_sae", same), ("alive latents", equal)):
        better = [
            f"{kind} on {MEASURES[m]} {by_measure[m]}"
            for kind, by_measure in effects.items()
            for m in _BETTER
            if m in by_measure and by_measure[m].sign > 0
        ]
        lines.append(f"At equal {where}: {'; '.join(better) or 'nothing'}.")
    return " ".join(lines)
