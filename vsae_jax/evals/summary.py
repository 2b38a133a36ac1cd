"""`evals/summary.md`: arms side by side, mean and standard deviation over seeds."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vsae_jax import runs
from vsae_jax.npy import replace_file

_CORE = (
    "ce_loss_score",
    "kl_div_score",
    "explained_variance",
    "cossim",
    "l0",
    "frac_alive",
    "entropy_effective_latents",
)


def write(folder: Path) -> Path:
    """Writes the tables of all evaluations that a run's or a grid's folder holds."""
    path = folder / runs.EVALS / "summary.md"
    path.parent.mkdir(exist_ok=True)
    replace_file(path, markdown(folder).encode())
    return path


def markdown(folder: Path) -> str:
    """One table per evaluation, one row per arm, seeds taken together."""
    arms = by_arm(folder)
    names = dict.fromkeys(
        name for each in arms.values() for one in each for name in one
    )
    parts = [f"# {folder.resolve().name}\n"]
    parts.append("Mean ± standard deviation over seeds; - where there is no value.\n")
    for name in names:
        found = {
            arm: [one[name] for one in each if name in one]
            for arm, each in arms.items()
        }
        parts.append(f"## {name}\n\n{_table(found)}\n")
        if notes := _notes(found):
            parts.append(notes + "\n")
    return "\n".join(parts)


def by_arm(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """What each run's evaluations wrote, by name, under the arm without its seed."""
    arms: dict[str, list[dict[str, Any]]] = {}
    labels = _labels(folder)
    for each in runs.run_folders(folder):
        name = labels.get(each.name) or each.resolve().name
        arms.setdefault(name, []).append(_results(each))
    return arms


def spread(values: Sequence[float | None]) -> str:
    """Mean ± standard deviation of what is known."""
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    digits = 4 if max(map(abs, known)) < 10 else 1
    mean = f"{statistics.fmean(known):.{digits}f}"
    if len(known) == 1:
        return mean
    return f"{mean} ± {statistics.stdev(known):.{digits}f}"


def _labels(folder: Path) -> dict[str, str]:
    """What a grid's arms differ in, but for the seed, by folder."""
    if not (folder / runs.GRID).is_file():
        return {}
    grid = runs.read_json(folder / runs.GRID)
    names = [name for name in grid.get("swept", []) if name != "seed"]
    return {
        str(arm.get("folder")): ", ".join(f"{name} {arm.get(name)}" for name in names)
        for arm in grid.get("arms", [])
        if isinstance(arm, dict)
    }


def _results(folder: Path) -> dict[str, Any]:
    paths = sorted((folder / runs.EVALS).glob("*.json"))
    order = {name: i for i, name in enumerate(("core", "sparse_probing", "scr", "tpp"))}
    paths.sort(key=lambda path: order.get(path.stem, len(order)))
    return {path.stem: runs.read_json(path) for path in paths}


def _table(found: dict[str, list[dict[str, Any]]]) -> str:
    """Metrics down, arms across: there are more metrics than arms."""
    arms = {arm: each for arm, each in found.items() if each}
    metrics = dict.fromkeys(
        m for each in arms.values() for one in each for m in one["metrics"]
    )
    if set(_CORE) <= set(metrics):
        metrics = dict.fromkeys([*_CORE, *metrics])
    counts = [f"{arm} (n={len(each)})" for arm, each in arms.items()]
    lines = [["metric", *counts], ["---"] * (len(arms) + 1)]
    for metric in metrics:
        cells = [
            spread([one["metrics"].get(metric) for one in each])
            for each in arms.values()
        ]
        lines.append([metric, *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _notes(found: dict[str, list[dict[str, Any]]]) -> str:
    """What was done about decoder norms, reasons of refusals, and bugs switched on."""
    each = [one for results in found.values() for one in results]
    lines = [f"Not evaluated: {one['reason']}" for one in each if one.get("reason")]
    for arm, results in found.items():
        norms = sorted(
            {str(one["config"].get("decoder_norms", "1")) for one in results}
        )
        if norms and norms != ["1"]:
            lines.append(f"Decoder norms of {arm}: {'; '.join(norms)}.")
    quirks = sorted({q for one in each for q in one["config"].get("quirks", [])})
    if quirks:
        lines.append(f"SAEBench's quirks: {', '.join(quirks)}.")
    return "\n".join(dict.fromkeys(lines))
