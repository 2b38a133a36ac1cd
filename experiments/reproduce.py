"""`python -m experiments.reproduce --scale=smoke|standin|real|large|paper`: the study.

Extracts, trains every grid, evaluates, draws, and writes `report.md`, `report.html` and
`figures/`; stopped or killed, the same command goes on. `--only` takes some of the
parts (and writes `report_<parts>.md`), `--only_look` reports what is finished so far,
`--dry_run` prints what would be done and what it would take.

`smoke` needs nothing but this repository. `standin` takes any small GPT-NeoX and any
stories; without `--dataset` it reads the bundled model's own 390,000 tokens. `real`
and `large` read a language model and texts from disk (`--model`, `--dataset`,
`--labelled`); the first takes two cores, the second a GPU. `paper` needs a GPU, and the
hub where those are not given.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from experiments import (
    ablation,
    claims,
    cross,
    family,
    fig3_core,
    fig4_scr,
    fig5_tpp,
    fig6_7_features,
    fig8_9_histograms,
    fig10_11_tsne,
    ground_truth,
    labels,
    plan,
    primary,
    questions,
    report,
    signal_to_noise,
    stability,
    without_topk,
)
from experiments.scales import SCALES, Scale, ScaleName
from experiments.study import Study, say
from vsae_jax.activations import text
from vsae_jax.config import cli
from vsae_jax.config.fields import REQUIRED, check_at_least, flag
from vsae_jax.system.errors import UserError

# In the order in which they need each other.
PARTS: dict[str, ModuleType] = {
    module.__name__.rsplit(".", 1)[-1]: module
    for module in (
        signal_to_noise,
        ablation,
        stability,
        cross,
        ground_truth,
        family,
        without_topk,
        fig3_core,
        fig4_scr,
        fig5_tpp,
        fig6_7_features,
        fig8_9_histograms,
        fig10_11_tsne,
        primary,
        questions,
        claims,
    )
}
# What a reader wants first.
_FIRST = ("claims", "primary", "questions")
_SETS_OF_PAPER = "bias_in_bios,amazon_reviews,ag_news"


@dataclass(frozen=True)
class ReproduceConfig:
    """Runs the study: trains, evaluates and compares, and writes a report."""

    scale: ScaleName = flag("how large", "smoke")
    out: str = flag("folder; unset: experiments/results/<scale>", "")
    only: str = flag("comma list of parts; unset: all", "")
    only_look: bool = flag(
        "train and evaluate nothing; report what is finished so far", False
    )
    dry_run: bool = flag("print arms, steps, disk, memory and time; do nothing", False)
    model: str = flag("hub id or local folder; unset: the scale's", "")
    dataset: str = flag("hub id or file of text; unset: the scale's", "")
    labelled: str = flag(
        "comma list of labelled .jsonl files, as in evaluate; unset: made from the "
        "text by a rule, or SAEBench's sets at --scale=paper",
        "",
    )
    label_column: str = flag("as in evaluate", "label")
    attribute_column: str = flag("as in evaluate", "")
    probe_seeds: int = flag(
        "as in evaluate; what was evaluated on fewer is evaluated again", 1
    )

    def __post_init__(self):
        check_at_least(self, 1, "probe_seeds")


def command(configs: Sequence[ReproduceConfig]) -> None:
    """Runs the parts and writes the report."""
    (c,) = configs
    asked = [name.strip() for name in c.only.split(",")] if c.only else list(PARTS)
    for name in asked:
        if name not in PARTS:
            there = ", ".join(PARTS)
            raise UserError(f"--only={name} is not a part; there is {there}")
    study = open_study(c)
    if c.dry_run:
        print(plan.table(study, [PARTS[name] for name in asked]))
        return
    missing: list[str] = []
    if study.only_look:
        missing = [n for n in asked if not any(map(study.has, PARTS[n].grids(study)))]
        print(f"nothing is trained of: {', '.join(missing) or '-'}")
    elif not study.labelled:
        study = dataclasses.replace(study, labelled=labelled_by_rule(study))
    sections = {}
    for name in (name for name in asked if name not in missing):
        say(name)
        command = f"python -m experiments.reproduce --scale={c.scale} --only={name}"
        try:
            sections[name] = PARTS[name].run(study)._replace(command=command)
        except UserError as error:
            if not study.only_look:
                raise
            print(f"left out: {error}")
    names = list(sections)
    order = [n for n in _FIRST if n in names] + [n for n in names if n not in _FIRST]
    # Some of the parts do not take the whole report's place.
    stem = "_".join(["report", *asked]) if c.only else "report"
    written = report.write(
        study.out / stem,
        f"The study at scale {c.scale}",
        _summary(c, study),
        [sections[name] for name in order],
    )
    print(f"wrote {written[0]} and {written[1].name}")


def open_study(c: ReproduceConfig) -> Study:
    """The study that the flags describe; nothing is written."""
    scale = _with_text(SCALES[c.scale], c)
    for name in ("model", "dataset"):
        if getattr(scale.text, name) == REQUIRED:
            raise UserError(
                f"--scale={c.scale} needs --{name}: a local "
                f"{'folder' if name == 'model' else 'file of text'} or a hub id"
            )
    labelled = {}
    sets = c.labelled or (_SETS_OF_PAPER if c.scale == "paper" else "")
    if sets:
        labelled = {
            "labelled": sets,
            "label_column": c.label_column,
            "attribute_column": c.attribute_column,
        }
    out = Path(c.out or f"experiments/results/{c.scale}")
    return Study(
        scale=scale,
        out=out,
        labelled=labelled,
        only_look=c.only_look,
        probe_seeds=c.probe_seeds,
    )


def _with_text(scale: Scale, c: ReproduceConfig) -> Scale:
    given = {
        name: getattr(c, name) for name in ("model", "dataset") if getattr(c, name)
    }
    return dataclasses.replace(scale, text=dataclasses.replace(scale.text, **given))


def labelled_by_rule(study: Study) -> dict[str, str]:
    """The flags of evaluations on the study's own text."""
    stories = text.documents(study.dataset, split="train", text_column="text")
    path = labels.write(
        study.out / "texts" / "stories.jsonl",
        labels.all_but_last(stories, study.tuning_documents),
        most=study.scale.train_size + study.scale.test_size,
    )
    return {
        "labelled": str(path),
        "label_column": labels.LABEL,
        "attribute_column": labels.ATTRIBUTE,
    }


def _summary(c: ReproduceConfig, study: Study) -> str:
    probes = str(c.probe_seeds) if c.probe_seeds > 1 else ""
    flags = {"scale": c.scale, "only": c.only, "probe_seeds": probes}
    given = " ".join(f"--{name}={value}" for name, value in flags.items() if value)
    model, dataset = (
        "the bundled model" if not study.scale.text.model else Path(study.model).name,
        "its own stories" if not study.scale.text.dataset else Path(study.dataset).name,
    )
    layers = ", ".join(map(str, study.scale.text.layers))
    return (
        f"Language model: {model}; text: {dataset}; layer {layers}. Intervals are "
        "95 %, Student's t, of differences paired over seeds; one that "
        "excludes 0 is bold, without correction for the number of comparisons. Made by "
        f"`python -m experiments.reproduce {given}`."
    )


if __name__ == "__main__":
    cli.main(command, ReproduceConfig)
