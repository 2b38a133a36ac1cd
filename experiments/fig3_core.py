"""Figure 3: loss recovered, explained variance, cosine and alive latents over k.

Claim (Baker and Li 4.1): the SAE is better on loss recovered and slightly on explained
variance, the vSAE on cosine, and the vSAE has far fewer alive latents.

Command:

    python -m experiments.reproduce --scale=standin --only=fig3_core --out=DIR

The paper (its files, docs/paper_and_code.md 6): at k 64 to 512 loss recovered .88 to
1.03 against .85 to 1.03, alive .96 to .98 against .05 to .37. Ours: the reports in
experiments/results.
"""

from experiments import paper_grids
from experiments.report import Section
from experiments.study import Arms, Study

MEASURES = {
    "ce_loss_score": "loss recovered",
    "explained_variance": "expl. var.",
    "cossim": "cosine",
    "alive": "alive",
    "entropy_effective_latents": "effective",
}


def grids(study: Study) -> dict[str, Arms]:
    """The paper's grids."""
    return paper_grids.grids(study)


def run(study: Study) -> Section:
    """Figure and differences."""
    section = paper_grids.lines_section(
        study,
        "fig3_core",
        figure="core",
        evals="core",
        measures=MEASURES,
        title="Figure 3: core metrics",
        claim="TopK is better on loss recovered and explained variance, the vSAE on "
        "cosine; the vSAE has far fewer alive latents",
        paper="loss recovered .8824 .9412 1.0294 1.0294 (TopK, k 64 to 512) against "
        ".8529 .8824 .9412 1.0294; alive .96 .81 .93 .98 against .05 .09 .18 .37",
    )
    if study.scale.text.max_norm_multiple is None:
        return section
    which = (
        "The explained variance of the table is that of ordinary rows; the figure's is "
        "that of all rows, most of whose variance a few massive ones make."
    )
    return section._replace(parts=[*section.parts, which])
