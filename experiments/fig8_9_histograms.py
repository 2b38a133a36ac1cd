"""Figures 8 and 9: how strongly latents fire at most, and how many fire at all.

Claim (Baker and Li 4.2): 1,227 latents of the vSAE against 6,970 of the SAE, 82 %
fewer.

Command:

    python -m experiments.reproduce --scale=standin --only=fig8_9_histograms --out=DIR

The paper counted bars of a histogram clipped to [0, 2.5]; in its files 1,474 against
7,379 fire, 80.0 % fewer (docs/paper_and_code.md 4). Here nothing is clipped, and the
clipped count stands in the figure beside the others. Ours:
experiments/results/look-inside.
"""

from experiments import paper_grids
from experiments.report import Section, Table
from experiments.study import Arms, Study
from vsae_jax.latents.feature_files import read_statistics
from vsae_jax.latents.map_statistics import alive_counts
from vsae_jax.runs import series


def grids(study: Study) -> dict[str, Arms]:
    """The paper's grids."""
    return paper_grids.grids(study)


def run(study: Study) -> Section:
    """Histograms and counts at the smallest k."""
    from vsae_jax.report.figures import histograms

    names = paper_grids.trained(study)
    for name in names:
        arms = paper_grids.with_first_k(study, name)
        study.find_features(arms, study.scale.figures.feature_tokens)
    drawn = paper_grids.draw(
        study,
        names,
        histograms.max_activations,
        label="fig8_9",
        arms=lambda name: paper_grids.with_first_k(study, name),
    )
    return Section(
        parts=[*drawn, *(_counts(study, name) for name in names)],
        title="Figures 8 and 9: maximum activations",
        claim="the vSAE has 82 % fewer latents that were recorded as active",
        paper="1,227 against 6,970 (82 % fewer) of a clipped histogram; 1,474 against "
        "7,379 (80 %) in its own files",
    )


def _counts(study: Study, name: str) -> Table:
    kinds = series.series_of(paper_grids.with_first_k(study, name))
    counts = {
        series.label(shared): [_of_features(arm) for arm in members]
        for shared, members in kinds.items()
    }
    measures = dict.fromkeys(m for each in counts.values() for one in each for m in one)
    rows = [[name, *measures]]
    for label, each in counts.items():
        cells = [series.spread([one[m] for one in each]) for m in measures]
        rows.append([label, *cells])
    return rows


def _of_features(arm: series.Arm) -> dict[str, float]:
    features = read_statistics(arm)
    return alive_counts(features.firing_rate, features.max_activation)
