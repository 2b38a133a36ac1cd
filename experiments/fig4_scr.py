"""Figure 4: spurious correlation removal over the number of ablated latents.

Claim (Baker and Li 4.1): the vSAE is better at all sparsities; its scores peak higher
and later (near 64 where the SAE falls from 32 on).

Command:

    python -m experiments.reproduce --scale=standin --only=fig4_scr --out=DIR

The paper (docs/paper_and_code.md 6): at k 256 and 20 ablated latents .0121 against
.1359, at 100 -.5981 against .2008. Ours: the reports in experiments/results.
"""

from experiments import paper_grids
from experiments.report import Section
from experiments.study import Arms, Study

MEASURES = {
    f"scr_metric_threshold_{n}": f"SCR {n}" for n in (2, 5, 10, 20, 50, 100)
} | {"scr": "mean of 2 to 50"}


def grids(study: Study) -> dict[str, Arms]:
    """The paper's grids."""
    return paper_grids.grids(study)


def run(study: Study) -> Section:
    """Figure and differences."""
    return paper_grids.lines_section(
        study,
        "fig4_scr",
        figure="scr",
        evals=paper_grids.TEXT_EVALS,
        measures=MEASURES,
        title="Figure 4: SCR",
        claim="the vSAE outperforms the SAE at all sparsities and stays stable longer",
        paper="k 256: -.0155 .0155 .0121 -.3775 (TopK, 2, 10, 20, 50 ablated) against "
        ".0421 .1364 .1359 .2068",
    )
