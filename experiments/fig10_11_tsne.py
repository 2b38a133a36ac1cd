"""Figures 10 and 11: t-SNE maps of the latents, and numbers on how they lie.

Claim (Baker and Li 4.3): the vSAE's latents are more dispersed, in fewer tight
clusters, and more evenly used.

Command:

    python -m experiments.reproduce --scale=standin --only=fig10_11_tsne --out=DIR

The paper shows one map of each and no number but cluster sizes (56 to 151 against 60 to
152). Every number here stands beside its value by chance. Ours:
experiments/results/look-inside.
"""

from experiments import paper_grids
from experiments.report import Section, Table
from experiments.study import Arms, Study
from vsae_jax import runs, tsne
from vsae_jax.runs import series
from vsae_jax.runs.series import Arm
from vsae_jax.system.errors import UserError

MAP = (tsne.FOLDER, "maps.json")


def grids(study: Study) -> dict[str, Arms]:
    """The paper's grids."""
    return paper_grids.grids(study)


def run(study: Study) -> Section:
    """Maps and numbers of the preset `paper`, smallest k."""
    from vsae_jax.report.figures import maps

    name = paper_grids.trained(study)[0]
    arms = paper_grids.with_first_k(study, name)
    study.find_features(arms, study.scale.figures.feature_tokens)
    mapped = [arm for arm in arms if _mapped(study, arm)]
    if study.only_look and not mapped:
        raise UserError("no map is drawn yet")
    drawn = paper_grids.draw(
        study, [name], maps.panels, label="fig10_11", arms=lambda _: mapped, kind="png"
    )
    return Section(
        parts=[
            *drawn,
            *([_numbers(mapped)] if mapped else ["No arm could be mapped."]),
        ],
        title="Figures 10 and 11: maps",
        claim="the vSAE's latents are more dispersed and more evenly used",
        paper="one map of each; cluster sizes 56 to 151 (vSAE), 60 to 152 (SAE)",
    )


def _mapped(study: Study, arm: Arm) -> bool:
    """Whether there is a map; an arm with too few latents for one has none."""
    if study.only_look:
        return arm.folder.joinpath(*MAP).is_file()
    if not arm.folder.joinpath(*MAP).is_file():
        try:
            config = tsne.MapConfig(run=str(arm.folder), samples=study.scale.samples)
            tsne.run(config)
        except UserError as error:
            print(error)
            return False
    return True


def _numbers(arms: list[Arm]) -> Table:
    rows = [["", "seeds", *tsne.COLUMNS.values()]]
    for shared, members in series.series_of(arms).items():
        each = [runs.read_json(a.folder.joinpath(*MAP))["metrics"] for a in members]
        cells = [series.spread([m[c] for m in each]) for c in tsne.COLUMNS]
        rows.append([series.label(shared), str(len(members)), *cells])
    return rows
