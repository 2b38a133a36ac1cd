"""`python -m vsae_jax.evaluate --run=RUN`: numbers that compare autoencoders.

Evaluates a run or a whole grid and prints a table with a row per arm. Writes
`evals/<name>.json` into every run folder, and `evals/summary.md` into the run's or the
grid's. The language model and the held-out contexts come from the run's config,
labelled texts from `--labelled`.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from vsae_jax import runs
from vsae_jax.config import EvalConfig, cli
from vsae_jax.evals import (
    NAMES,
    Subject,
    absorption,
    core,
    on_texts,
    predictability,
    saebench_json,
    stability,
    summary,
)
from vsae_jax.evals.labelled import TextSet
from vsae_jax.evals.quirks import Quirks, read_quirks
from vsae_jax.evals.subjects import open_subjects
from vsae_jax.system.errors import UserError

# Those that do not read labelled texts.
_OTHERS = {
    "core": core,
    "absorption": absorption,
    "stability": stability,
    "predictability": predictability,
}
COLUMNS = {
    "ce_loss_score": "loss recovered",
    "kl_div_score": "KL score",
    "explained_variance": "expl. var.",
    "cossim": "cosine",
    "l0": "L0",
    "frac_alive": "alive",
    "entropy_effective_latents": "effective",
}
_OF_TEXTS = {
    "sae_test_accuracy": "probe",
    "llm_test_accuracy": "residual's",
    "sae_top_1_test_accuracy": "top-1 probe",
    "llm_top_1_test_accuracy": "residual's top-1",
    "scr_metric_threshold_20": "SCR 20",
    "tpp_threshold_20_total_metric": "TPP 20",
    "decoder_cosine_median": "returns, cosine",
    "correlation_median": "returns, corr.",
    "auc_by_token_median": "AUC by token",
    "auc_by_bigram_median": "AUC by bigram",
}


def command(configs: Sequence[EvalConfig]) -> None:
    """Evaluates what `--run` names and prints the table."""
    run(configs[0])


def run(eval_config: EvalConfig) -> dict[str, dict[str, Any]]:
    """Writes `evals/<name>.json` for every arm; returns the metrics by arm, of those
    that were evaluated."""
    names = _eval_names(eval_config)
    folders = to_evaluate(eval_config)
    if not folders:
        print(f"every arm of {eval_config.run} has {', '.join(names)}")
        print(f"wrote {summary.write(Path(eval_config.run))}")
        return {}
    quirks = read_quirks(
        eval_config.quirks, all_of_them=eval_config.saebench_compatible
    )
    of_texts = [name for name in names if name in on_texts.EVALS]
    sets = on_texts.open_sets(of_texts, eval_config) if of_texts else []
    # All of it is checked before the first pass of a language model.
    checked = [
        (subjects, _checked(subjects, sets, names, eval_config, quirks))
        for subjects in open_subjects(eval_config, folders)
    ]
    results: dict[str, dict[str, Any]] = {}
    try:
        for subjects, texts in checked:
            evaluated = _evaluated(subjects, texts, names, eval_config, quirks)
            for name, found in evaluated:
                for subject, result in zip(subjects, found, strict=True):
                    _write(subject, name, result, saebench=eval_config.saebench_json)
                    arm = subject.run.folder.resolve().name
                    results.setdefault(arm, {}).update(result["metrics"])
    finally:
        if results:
            print(f"wrote {summary.write(Path(eval_config.run))}")
            print(table(results))
    return results


def to_evaluate(config: EvalConfig) -> list[Path]:
    """The arms' folders: all of `--run`, or with `--only_missing` those that lack a
    result. A file that cannot be read is none."""
    names, folders = _eval_names(config), runs.run_folders(config.run)
    if not config.only_missing:
        return folders
    there = {folder: summary.results_of(folder, names) for folder in folders}
    missing = [
        folder
        for folder, results in there.items()
        if not all(_has(results, name, folder, config) for name in names)
    ]
    # It compares arms with each other.
    return folders if missing and "stability" in names else missing


def table(results: dict[str, dict[str, Any]]) -> str:
    """A row per arm with the main metrics that any arm has, under short names. A
    probe's test accuracy on the latents is followed by that of the same probe on the
    residual stream."""
    columns = COLUMNS | _OF_TEXTS
    there = {
        name
        for metrics in results.values()
        for name, value in metrics.items()
        if value is not None
    }
    known = [c for c in columns if c in there]
    rows = [["", *(columns[column] for column in known)]]
    for name, metrics in results.items():
        rows.append([name, *(_cell(metrics.get(column)) for column in known)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])])
        for row in rows
    ]
    return "\n".join(lines)


def _cell(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.4f}" if abs(value) < 10 else f"{value:.1f}"


def _eval_names(config: EvalConfig) -> list[str]:
    names = list(dict.fromkeys(name.strip() for name in config.evals.split(",")))
    for name in names:
        if name not in NAMES:
            raise UserError(f"--evals={name} is not known; there is {', '.join(NAMES)}")
        if name in on_texts.EVALS and not config.labelled:
            raise UserError(
                f"--evals={name} needs labelled texts; name them with --labelled"
            )
    return names


def _has(
    results: Mapping[str, Mapping[str, Any]],
    name: str,
    folder: Path,
    config: EvalConfig,
) -> bool:
    """Whether an arm has a result, of as many seeds of the probes as are asked for, and
    in SAEBench's schema where that is asked for."""
    if (result := results.get(name)) is None:
        return False
    if config.saebench_json and saebench_json.has_schema_of(name, result):
        path = saebench_json.path_of(folder / runs.EVALS, name)
        if not path.is_file():
            return False
    if name not in on_texts.EVALS or config.probe_seeds == 1:
        return True
    return len(result.get(on_texts.PER_SEED) or []) >= config.probe_seeds


def _checked(
    subjects: Sequence[Subject],
    sets: Sequence[tuple[TextSet, on_texts.Planned]],
    names: Sequence[str],
    config: EvalConfig,
    quirks: Quirks,
) -> list[on_texts.Tokenised]:
    """The labelled texts as the subjects' model reads them; refuses subjects for which
    an evaluation lacks what it needs, or a place to write to."""
    for subject in subjects:
        _check_place(subject.run.folder / runs.EVALS, names)
    for name in (name for name in _OTHERS if name in names):
        given = [config] if name == "absorption" else []
        _OTHERS[name].check(subjects, *given)
    return on_texts.read(subjects, sets, quirks) if sets else []


def _evaluated(
    subjects: Sequence[Subject],
    sets: Sequence[on_texts.Tokenised],
    names: Sequence[str],
    config: EvalConfig,
    quirks: Quirks,
) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Yields each evaluation's name and its subjects' results as soon as it is done."""
    if "core" in names:
        print(f"core on {subjects[0].config['n_tokens']:,} tokens")
        yield "core", core.run(subjects, quirks)
    of_texts = [name for name in names if name in on_texts.EVALS]
    yield from on_texts.run(subjects, sets, of_texts, config, quirks).items()
    if "absorption" in names:
        results = absorption.run(subjects, config, quirks)
        if reason := results[0].get("reason"):
            print(f"absorption is refused: {reason}")
        yield "absorption", results
    if "stability" in names:
        yield "stability", stability.run(subjects)
    if "predictability" in names:
        yield "predictability", predictability.run(subjects)


def _write(
    subject: Subject, name: str, result: dict[str, Any], *, saebench: bool
) -> None:
    folder = subject.run.folder / runs.EVALS
    _check_finite(result["metrics"], subject.run.folder)
    files = {folder / f"{name}.json": result}
    if saebench and (theirs := saebench_json.in_their_schema(subject, name, result)):
        files[saebench_json.path_of(folder, name)] = theirs
    for path, value in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        runs.write_json(path, value)
        print(f"wrote {path}")


def _check_place(folder: Path, names: Sequence[str]) -> None:
    """Refuses files and folders that are in the way of the results."""
    files = (folder / name for name in (*(f"{n}.json" for n in names), "summary.md"))
    taken = [folder] if folder.exists() and not folder.is_dir() else []
    taken += [path for path in files if path.is_dir()]
    if taken:
        raise UserError(f"{taken[0]} is in the way of the results; move or delete it")


def _check_finite(metrics: dict[str, float | None], folder: Path) -> None:
    for name, value in metrics.items():
        if value is not None and not math.isfinite(value):
            raise UserError(
                f"{name} of {folder} is {value}: its parameters or the language "
                "model's are not finite numbers"
            )


if __name__ == "__main__":
    cli.main(command, EvalConfig)
