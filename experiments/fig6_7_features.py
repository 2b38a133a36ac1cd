"""Figures 6 and 7: one latent of the SAE and one of the vSAE, looked at.

Claim (Baker and Li 4.2): both have interpretable latents; no large difference was
found.

Command:

    python -m experiments.reproduce --scale=standin --only=fig6_7_features --out=DIR

The paper picked its latents by eye ("giving thanks", "feelings"). Here they are picked
by a rule, so that nothing is chosen for its looks: of the latents that fire on between
0.1 % and 5 % of the tokens the one in the middle by firing rate. Their texts come from
the bundled model's own stories, which may be printed. Ours:
experiments/results/look-inside.
"""

import shutil

import numpy as np

from experiments import paper_grids
from experiments.report import Section
from experiments.study import STORIES, Arms, Study
from vsae_jax import maximise, runs
from vsae_jax.latents.feature_files import read_statistics
from vsae_jax.runs.series import Arm
from vsae_jax.system.errors import UserError

_RATES = (0.001, 0.05)
_STORY_TOKENS = 100_000


def grids(study: Study) -> dict[str, Arms]:
    """The paper's grids."""
    return paper_grids.grids(study)


def run(study: Study) -> Section:
    """A page for one latent of each variant, seed 0."""
    from vsae_jax.report.figures import features

    name = paper_grids.trained(study)[0]
    arms = [
        arm
        for arm in paper_grids.with_first_k(study, name)
        if arm.settings.get("seed", 0) == 0
    ]
    stories = _stories(study, name)
    arms = [_copy(study, arm) for arm in arms]
    study.find_features(arms, study.scale.figures.feature_tokens, activations=stories)
    for arm in arms:
        latent = middle(arm)
        if not (arm.folder / maximise.FOLDER / f"{latent}.json").is_file():
            maximise.run(
                maximise.MaximiseConfig(
                    run=str(arm.folder), latents=str(latent), activations=stories
                )
            )
    drawn = paper_grids.draw(
        study, [name], features.pages, label="fig6_7", arms=lambda _: arms
    )
    return Section(
        parts=[
            "Picked by a rule, not by eye: the latent in the middle by firing rate of "
            "those that fire on 0.1 % to 5 % of the tokens.",
            *drawn,
        ],
        title="Figures 6 and 7: two latents",
        claim="no large difference in interpretability",
        paper="two latents picked by eye",
    )


def _copy(study: Study, arm: Arm) -> Arm:
    """The trained arm once more, for what is made of these texts alone: the other
    figures have their own passes over the held-out text."""
    folder = study.out / "stories" / arm.folder.name
    folder.mkdir(parents=True, exist_ok=True)
    for name in (runs.CONFIG, runs.PARAMETERS):
        shutil.copyfile(arm.folder / name, folder / name)
    return arm._replace(folder=folder)


def _stories(study: Study, name: str) -> str:
    """Activations of the bundled stories; "" where the study is made of them. A model
    from the hub reads its own text."""
    if study.scale.text.model or study.dataset == str(STORIES):
        return ""
    preset, layer = name.rsplit("-", 1)
    out = study.out / "rows" / f"stories-{name}"
    settings = {"dataset": str(STORIES), "num_tokens": _STORY_TOKENS, "out": out}
    return str(study.rows(preset, int(layer), **settings))


def middle(arm: Arm) -> int:
    """The latent with the median firing rate of those in the range."""
    rate = read_statistics(arm).firing_rate
    low, high = _RATES
    there = np.flatnonzero((rate > low) & (rate < high))
    if not len(there):
        raise UserError(f"{arm.folder}: no latent fires on {low:g} to {high:g}")
    return int(there[np.argsort(rate[there], kind="stable")[len(there) // 2]])
