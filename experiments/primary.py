"""The primary outcomes: one a question, the same at every scale.

Command:

    python -m experiments.reproduce --scale=standin --only=primary --out=DIR

They were named after the stand-in study and a first look at stability on a real model,
and before that model was studied whole; later the map's was given the same beta at
every scale. Their p values are corrected for their number
by Holm's method; every other interval of the report is exploratory, and about one in
twenty excludes 0 by chance.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

from experiments import ablation, kept, questions, signal_to_noise, stability
from experiments.paired import Interval, holm
from experiments.report import Section
from experiments.study import Arms, Study

FILE = "primary"
_COLUMNS = ("vSAE's part - without it", "here", "p (Holm)", "says")


class Outcome(NamedTuple):
    """A question, the contrast and the measure that answer it, and the difference."""

    question: str
    contrast: str
    found: Interval | None


def grids(study: Study) -> dict[str, Arms]:
    """Those of the parts that it reads."""
    return signal_to_noise.grids(study) | stability.grids(study)


def run(study: Study) -> Section:
    """One row a question."""
    signal_to_noise.measured(study)
    stability.trained(study)
    outcomes = of(study)
    corrected = iter(holm([o.found.p for o in outcomes if o.found]))
    told = [_line(o, next(corrected)) if o.found else _line(o) for o in outcomes]
    kept.keep(study, FILE, told)
    elsewhere = kept.elsewhere(study, FILE)
    rows = [["question", *_COLUMNS, *elsewhere]]
    for here in told:
        others = [_beside(there, here) for there in elsewhere.values()]
        rows.append([here["question"], *(here[c] for c in _COLUMNS), *others])
    return Section("Primary outcomes", "", "", [rows])


def _line(outcome: Outcome, p: float = math.nan) -> dict[str, str]:
    """What is kept of an outcome; p is corrected, and NaN where it is unknown."""
    sign = outcome.found.sign if outcome.found and p < 0.05 else 0
    says = {-1: "less", 0: "not shown", 1: "more"}[sign]
    return {
        "question": outcome.question,
        "vSAE's part - without it": outcome.contrast,
        "here": str(outcome.found or "not measured"),
        "p (Holm)": "-" if math.isnan(p) else f"{p:.2g}",
        "says": "-" if math.isnan(p) else says,
    }


def _beside(there: Mapping[str, kept.Line], here: kept.Line) -> str:
    """The same outcome at another scale, and whether it says the same."""
    other = there.get(here["question"])
    if other is None or other["says"] == "-":
        return "-"
    same = "as here" if other["says"] == here["says"] else f"there: {other['says']}"
    return f"{other['here']}, p {other['p (Holm)']} ({same})"


def of(study: Study) -> list[Outcome]:
    """The outcomes, of what is trained and evaluated."""
    core = study.metrics(ablation.GRID)
    returns = study.metrics(ablation.GRID, "stability")

    def between(found: dict, kind: str, base: str, measure: str) -> Interval | None:
        seeds, of_base = found.get(kind, {}), found.get(base, {})
        return ablation.against(seeds, of_base, [measure]).get(measure)

    # The beta of the arms; maps of some scales have others, too.
    beta = ablation.KINDS["vsae"]["beta"]
    cells = [
        cell
        for cell in signal_to_noise.cells(study)
        if cell.decoder == "unit" and cell.beta == beta
    ]
    unit = signal_to_noise.unit(study)
    closest = min(cells, key=lambda cell: abs(cell.norm - unit), default=None)
    place = f"norm {closest.norm:g}, beta {closest.beta:g}" if closest else "some norm"
    equal = questions.at_equal_alive(core, "vsae") if "vsae" in core else {}
    return [
        Outcome(
            "Does sampling make latents reproducible?",
            "`vsae` - `topk`, share of latents that return with another seed",
            between(returns, "vsae", "topk", stability.PRIMARY),
        ),
        Outcome(
            "What kills latents?",
            "`topk_kl` - `topk`, alive latents",
            between(core, "topk_kl", "topk", "alive"),
        ),
        Outcome(
            "Where does sigma = 1 train?",
            f"vSAE - TopK at {place}, explained variance",
            closest.difference("explained_variance") if closest else None,
        ),
        Outcome(
            "Does anything variational beat TopK?",
            "`vsae` - TopK with as many alive latents, loss recovered",
            equal.get("ce_loss_score"),
        ),
    ]
