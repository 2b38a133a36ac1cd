"""`evals/summary.md`: arms side by side, mean and standard deviation over seeds."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vsae_jax import runs
from vsae_jax.evals import NAMES
from vsae_jax.runs import series
from vsae_jax.runs.opening import OTHERS
from vsae_jax.system.errors import UserError
from vsae_jax.system.files import replace_file

_CORE = (
    "ce_loss_score",
    "kl_div_score",
    "explained_variance",
    "cossim",
    "l0",
    "frac_alive",
    "entropy_effective_latents",
)

# What arms that are compared should have in common.
_ALIKE = (
    "n_tokens",
    "tokens_from",
    "train_size",
    "test_size",
    "n_words",
    "probe_seeds",
    "quirks",
)


def write(folder: Path) -> Path:
    """Writes the tables of all evaluations that a run's or a grid's folder holds."""
    path = folder / runs.EVALS / "summary.md"
    path.parent.mkdir(exist_ok=True)
    replace_file(path, markdown(folder).encode())
    return path


def markdown(folder: Path) -> str:
    """A table per evaluation with a column per arm; its seeds share a column."""
    results = by_arm(folder)
    names = dict.fromkeys(
        name for each in results.values() for one in each for name in one
    )
    parts = [f"# {folder.resolve().name}\n"]
    parts.append("Mean ± standard deviation over seeds; - where there is no value.\n")
    for name in names:
        found = {
            arm: [one[name] for one in each if name in one]
            for arm, each in results.items()
        }
        parts.append(f"## {name}\n\n{_table(found)}\n")
        if notes := _notes(found):
            parts.append(notes + "\n")
    return "\n".join(parts)


def by_arm(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """What each run's evaluations wrote by name, under its arm's name without the
    seed."""
    found = series.series_of(series.open_arms(folder))
    return {
        series.label(shared): [results_of(arm.folder) for arm in each]
        for shared, each in found.items()
    }


def results_of(folder: Path, names: Sequence[str] = NAMES) -> dict[str, Any]:
    """What each of these evaluations wrote, in order. Other files are ignored; a file
    that cannot be read is left out with a note."""
    found = {}
    for name in names:
        path = folder / runs.EVALS / f"{name}.json"
        if not path.is_file():
            continue
        try:
            result = runs.read_json(path)
            if not isinstance(result.get("metrics"), dict) or "config" not in result:
                raise UserError(f"{path} has no metrics or no config")
            found[name] = result
        except UserError as error:
            print(f"note: not in the summary: {error}")
    return found


def _table(found: dict[str, list[dict[str, Any]]]) -> str:
    """A table with a row per metric and a column per arm."""
    each = {arm: results for arm, results in found.items() if results}
    metrics = dict.fromkeys(
        m for results in each.values() for one in results for m in one["metrics"]
    )
    if set(_CORE) <= set(metrics):
        metrics = dict.fromkeys([*_CORE, *metrics])
    rows = [["metric", *(f"{arm} (n={len(r)})" for arm, r in each.items())]]
    for metric in metrics:
        columns = ([one["metrics"].get(metric) for one in r] for r in each.values())
        rows.append([metric, *map(series.spread, columns)])
    return series.markdown(rows)


def _notes(found: dict[str, list[dict[str, Any]]]) -> str:
    """Reasons of refusals, how decoder norms were treated, quirks that are on, and what
    arms do not have in common."""
    each = [one for results in found.values() for one in results]
    lines = [f"Not evaluated: {one['reason']}" for one in each if one.get("reason")]
    for arm, results in found.items():
        norms = sorted(
            {str(one["config"].get("decoder_norms", "1")) for one in results}
        )
        if norms and norms != ["1"]:
            lines.append(f"Decoder norms of {arm}: {'; '.join(norms)}.")
    if any(one["config"].get("model_weights") == OTHERS for one in each):
        lines.append("With a language model of other weights than in training.")
    quirks = sorted({q for one in each for q in one["config"].get("quirks", [])})
    if quirks:
        lines.append(f"SAEBench's quirks: {', '.join(quirks)}.")
    for name in _ALIKE:
        values = {json.dumps(one["config"].get(name)) for one in each}
        if len(values) > 1:
            lines.append(f"Not alike: {name} is {' or '.join(sorted(values))}.")
    return "\n".join(dict.fromkeys(lines))
