"""Figure 5: targeted probe perturbation over the number of ablated latents.

Claim (Baker and Li 4.1): the vSAE peaks higher and later; the SAE has larger intended
effects, the vSAE smaller unintended ones.

Command:

    python -m experiments.reproduce --scale=standin --only=fig5_tpp --out=DIR

The paper (docs/paper_and_code.md 6): at k 256 the SAE's best is .2285 (10 ablated), the
vSAE's .2533 (50 ablated). Ours: the reports in experiments/results.
"""

from experiments import paper_grids
from experiments.report import Section
from experiments.study import Arms, Study

MEASURES = {
    f"tpp_threshold_{n}_total_metric": f"TPP {n}" for n in (2, 5, 10, 20, 50, 100)
} | {
    "tpp": "mean of 2 to 50",
    "tpp_threshold_20_intended_diff_only": "intended 20",
    "tpp_threshold_20_unintended_diff_only": "unintended 20",
}


def grids(study: Study) -> dict[str, Arms]:
    """The paper's grids."""
    return paper_grids.grids(study)


def run(study: Study) -> Section:
    """Figure and differences."""
    return paper_grids.lines_section(
        study,
        "fig5_tpp",
        figure="tpp",
        evals=paper_grids.TEXT_EVALS,
        measures=MEASURES,
        title="Figure 5: TPP",
        claim="the vSAE peaks higher and later; fewer unintended effects, and fewer "
        "intended ones",
        paper="k 256: .0835 .2285 .2095 .1240 (TopK, 2, 10, 20, 50 ablated) against "
        ".0143 .1125 .2011 .2533",
    )
