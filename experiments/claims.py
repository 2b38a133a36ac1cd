"""The claims table: each checkable sentence of the paper's results, and a verdict.

Command:

    python -m experiments.reproduce --scale=standin --only=claims --out=DIR

A verdict is made by rule from intervals that are paired over seeds: `holds` where every
condition's interval excludes 0 on the claimed side, `does not hold` where none does and
at least one excludes it on the other side, `holds only for ...` where some do, and `not
shown` where no interval excludes 0.
"""

from collections.abc import Sequence
from typing import NamedTuple

from experiments import ablation, kept, paper_grids, questions, stability
from experiments.paired import Interval, difference, over_probes
from experiments.report import Section
from experiments.study import Arms, Study

PREDICTABLE = "auc_by_bigram_median"
FILE = "claims"
_ABSORBED = "mean_full_absorption_score"
_PROBED = {
    "sae_top_1_test_accuracy": "best latent",
    "sae_top_2_test_accuracy": "best two",
    "sae_top_5_test_accuracy": "best five",
    "sae_test_accuracy": "all latents",
}
_SCR, _TPP = "scr_metric_threshold_{}", "tpp_threshold_{}_total_metric"
_NS = (2, 5, 10, 20, 50, 100, 500)
_NOT_TESTED = (
    "Not tested: that the vSAE is better at feature absorption (named in 4.1; the "
    "paper's code skips it). `evaluate --evals=absorption` asks, where the language "
    "model knows first letters."
)
# The arms that tell causes apart.
_CAUSES = ("topk_kl", "topk_noise", "vsae_no_noise", "vsae_no_penalty")


class Claim(NamedTuple):
    """A sentence of the paper; `sign` is that of the difference which it asserts,
    `code` what the released files say."""

    text: str
    code: str
    ours: dict[str, Interval]
    sign: int
    note: str = ""


def grids(study: Study) -> dict[str, Arms]:
    """Those of the parts that it reads."""
    return paper_grids.grids(study) | ablation.grids(study)


def run(study: Study) -> Section:
    """One row a claim."""
    names = paper_grids.trained(study, "core", paper_grids.TEXT_EVALS)
    of_causes = [*_of_causes(study), *_of_latents(study)]
    letters = _of_letters(study, names)
    claims = [*_of_core(study, names), *_of_texts(study, names), *letters, *of_causes]
    claims = [claim for claim in claims if claim.ours]
    noisy = any(found.noise for c in claims for found in c.ours.values())
    told = [
        {"claim": c.text, "ours": _ours(c), "verdict": verdict(c.ours, c.sign)}
        for c in claims
    ]
    kept.keep(study, FILE, told)
    elsewhere = kept.elsewhere(study, FILE)
    header = ["the paper", "its files", *elsewhere, "here", "verdict"]
    measured, causes = [header], [header]
    for claim, here in zip(claims, told, strict=True):
        others = [
            f"{there[claim.text]['verdict']}: {there[claim.text]['ours']}"
            if claim.text in there
            else "-"
            for there in elsewhere.values()
        ]
        rows = causes if claim in of_causes else measured
        rows.append([claim.text, claim.code, *others, here["ours"], here["verdict"]])
    return Section(
        parts=[
            "`paper-L` and `released-L` are vSAE - TopK under the two presets at layer "
            f"L, the mean over k ({_ks(study)}); the others are arms of the ablation. "
            "`released` differs in six things at once."
            + (f" sd: {paper_grids.NOISE}." if noisy else ""),
            *([measured] if len(measured) > 1 else []),
            "Causes, and single latents:",
            causes,
            *([] if any(claim.ours for claim in letters) else [_NOT_TESTED]),
            *_of_probes(study, names),
        ],
        title="The paper's claims",
        claim="",
        paper="",
    )


def verdict(ours: dict[str, Interval], sign: int) -> str:
    """The rule above."""
    if sign == 0 and any(found.n < 2 for found in ours.values()):
        return "not shown"
    for_it = [name for name, found in ours.items() if found.sign == sign]
    against = [name for name, found in ours.items() if found.sign not in (0, sign)]
    if len(for_it) == len(ours):
        return "holds"
    if for_it:
        return f"holds only for {', '.join(for_it)}"
    return "does not hold" if against else "not shown"


def _ours(claim: Claim) -> str:
    numbers = "; ".join(
        f"{name} {found}" + (f" (sd {found.noise})" if found.noise else "")
        for name, found in claim.ours.items()
    )
    return f"{claim.note}: {numbers}" if claim.note else numbers


def _ks(study: Study) -> str:
    f = study.scale.figures
    both = {"paper": f.k, "released": f.released_k or f.k}
    return "; ".join(f"{name}: {', '.join(map(str, k))}" for name, k in both.items())


def _of_core(study: Study, names: Sequence[str]) -> list[Claim]:
    def ours(measure: str) -> dict[str, Interval]:
        return {n: paper_grids.vsae_minus_topk(study, n, measure) for n in names}

    return [
        Claim(
            "the SAE consistently recovers more of the loss (4.1)",
            "at most -.06, equal at k 512, in steps of 1/34 (bfloat16)",
            ours("ce_loss_score"),
            -1,
        ),
        Claim(
            "the SAE explains slightly more variance (4.1)",
            "-.023 to 0 (with the mean counted as variance)",
            ours("explained_variance"),
            -1,
        ),
        Claim(
            "the vSAE's cosine similarity is higher (4.1)",
            "-.012 to +.004: higher at k 256 alone",
            ours("cossim"),
            1,
        ),
        Claim(
            "the vSAE has 82 % fewer living features (4.2, 5)",
            "80.0 % fewer where nothing is clipped",
            {n: _share(study, n, "alive") for n in names},
            -1,
            "as a share of TopK's",
        ),
        Claim(
            "latents of the vSAE are used more evenly (4.3)",
            "616 against 658 effective latents: the other way round",
            ours("entropy_effective_latents"),
            1,
        ),
        Claim(
            "the vSAE's latents are more dispersed (4.3)",
            "one t-SNE of each",
            ours("decoder_cosine"),
            -1,
            "nearest decoder cosine of alive latents, lower is more dispersed",
        ),
    ]


def _share(study: Study, name: str, measure: str) -> Interval:
    """(vSAE - TopK) / TopK."""
    found = study.metrics(name, "core")
    vsae, topk = (
        paper_grids.over_kinds(found, variant, measure)
        for variant in ("vsae_topk", "topk")
    )
    ratio = {s: vsae[s] / topk[s] for s in vsae.keys() & topk.keys()}
    return difference(ratio, dict.fromkeys(ratio, 1.0))


def _of_texts(study: Study, names: Sequence[str]) -> list[Claim]:
    def of(evals: str) -> list[str]:
        return [n for n in names if paper_grids.is_evaluated(study, n, evals)]

    def ours(measure: str, evals: str) -> dict[str, Interval]:
        return {
            n: paper_grids.vsae_minus_topk(study, n, measure, evals) for n in of(evals)
        }

    return [
        Claim(
            "the vSAE outperforms the SAE on SCR at all sparsities (4.1)",
            "at 20 ablated .136 and .084 against .012 and .004",
            ours("scr", "scr"),
            1,
            "mean of 2 to 50 ablated latents",
        ),
        Claim(
            "SCR of the vSAE peaks higher (4.1)",
            ".2068 and .0842 against .0155 and .0522",
            {n: _of_peak(study, n, "scr", _SCR) for n in of("scr")},
            1,
        ),
        Claim(
            "TPP of the vSAE peaks higher (4.1)",
            ".2533 and .2563 against .2285 and .2358",
            {n: _of_peak(study, n, "tpp", _TPP) for n in of("tpp")},
            1,
        ),
        Claim(
            "the vSAE has smaller unintended effects (TPP, 4.1)",
            "at 20 ablated .033 and .028 against .143 and .190",
            ours("tpp_unintended", "tpp"),
            -1,
        ),
    ]


def _of_probes(study: Study, names: Sequence[str]) -> list[str | list[list[str]]]:
    """Sparse probing, of which the paper claims nothing."""
    names = [n for n in names if paper_grids.is_evaluated(study, n, "sparse_probing")]
    if not names:
        return []
    said, table = paper_grids.difference_table(study, names, _PROBED, "sparse_probing")
    return [f"Accuracy of probes on each class's latents, no claim. {said}", table]


def _of_letters(study: Study, names: Sequence[str]) -> list[Claim]:
    """Nothing where the language model does not know first letters: `evaluate` then
    gives no number."""
    if not (words := study.scale.absorption_words):
        return []
    ours = {}
    for name in names:
        study.evaluate(name, "absorption", absorption_words=words)
        if not paper_grids.is_evaluated(study, name, "absorption"):
            continue
        found = study.metrics(name, "absorption")
        if paper_grids.over_kinds(found, "vsae_topk", _ABSORBED):
            ours[name] = paper_grids.vsae_minus_topk(
                study, name, _ABSORBED, "absorption"
            )
    claim = Claim(
        "the vSAE is better at feature absorption (4.1)",
        "skipped",
        ours,
        -1,
        "share of words whose letter another latent carries, lower is better",
    )
    return [claim]


def _of_peak(study: Study, name: str, evals: str, template: str) -> Interval:
    """The best score over the numbers of ablated latents, vSAE - TopK."""

    def of(probe: int | None) -> Interval:
        best = {
            kind: {seed: {"best": _best(m, template)} for seed, m in seeds.items()}
            for kind, seeds in study.metrics(name, evals, probe).items()
        }
        sides = (paper_grids.over_kinds(best, v, "best") for v in ("vsae_topk", "topk"))
        return difference(*sides)

    return over_probes(of, study.probes(name, evals))


def _best(metrics: dict[str, float | None], template: str) -> float | None:
    scores = [metrics.get(template.format(n)) for n in _NS]
    return max((s for s in scores if s is not None), default=None)


def _of_causes(study: Study) -> list[Claim]:
    ablation.measured(study)
    found = study.of_kinds(_CAUSES, ablation.GRID, "core,scr,tpp")
    of_topk, of_vsae = (ablation.of_switches(found, n) for n in ("topk", "vsae"))
    penalty = {
        "KL on TopK": of_topk["topk_kl"]["alive"],
        "no KL on the vSAE": negative(of_vsae["vsae_no_penalty"]["alive"]),
    }
    noise = {
        "noise on TopK": of_topk["topk_noise"]["alive"],
        "no noise on the vSAE": negative(of_vsae["vsae_no_noise"]["alive"]),
    }
    apart = {
        "noise on TopK": of_topk["topk_noise"]["decoder_cosine"],
        "no noise on the vSAE": negative(of_vsae["vsae_no_noise"]["decoder_cosine"]),
    }
    return [
        Claim(
            "the KL term kills latents (4.1, 5)",
            "TopK and vSAE differ in six things",
            penalty,
            -1,
            "alive latents",
        ),
        Claim(
            "sampling is unlikely to be a cause (4.1)",
            "never sampled",
            noise,
            0,
            "alive latents; holds where no interval excludes 0",
        ),
        Claim(
            "sampling pushes latents apart (2.3, 4.3)",
            "never sampled",
            apart,
            -1,
            "nearest decoder cosine",
        ),
        Claim(
            "gains in independence reflect the smaller dictionary (5)",
            "no such comparison",
            _at_equal_alive(study),
            0,
            "holds where nothing is left at equal alive latents",
        ),
    ]


def _at_equal_alive(study: Study) -> dict[str, Interval]:
    """SCR and TPP of the vSAE, less those of TopK with as many alive latents."""
    evals = "core,scr,tpp"
    probes = study.probes(ablation.GRID, evals)
    each: dict[int | None, dict[str, Interval]] = {
        probe: questions.at_equal_alive(
            study.metrics(ablation.GRID, evals, probe), "vsae"
        )
        for probe in (None, *probes)
    }
    return {
        f"{m} at equal alive": over_probes(
            lambda probe: each[probe][m], [p for p in probes if m in each[p]]
        )
        for m in ("scr", "tpp")
        if m in each[None]
    }


def _of_latents(study: Study) -> list[Claim]:
    """What the paper hopes of single latents: those of the ablation."""
    found = study.metrics(ablation.GRID, ",".join(stability.EVALS))
    topk, vsae = (found.get(name, {}) for name in ("topk", "vsae"))

    def ours(measure: str) -> dict[str, Interval]:
        by_measure = ablation.against(vsae, topk, [measure])
        return {"vsae - topk": d for d in by_measure.values()}

    return [
        Claim(
            "sampling organises latents (1.1, 2.3)",
            "never sampled",
            ours(stability.PRIMARY),
            1,
            "share of latents that return with another seed",
        ),
        Claim(
            "no large difference in the interpretability of single latents (4.2)",
            "two latents shown",
            ours(PREDICTABLE),
            0,
            "how well tokens predict a latent's firing (median area under the curve); "
            "holds where the interval includes 0",
        ),
    ]


def negative(found: Interval) -> Interval:
    """The effect of adding what the arm leaves out."""
    return Interval(0.0 - found.mean, 0.0 - found.high, 0.0 - found.low, found.n)
