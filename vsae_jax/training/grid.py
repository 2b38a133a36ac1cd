"""A grid: one run folder per arm below the grid's folder, and what came of it."""

import csv
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vsae_jax import runs
from vsae_jax.config import TrainConfig
from vsae_jax.config.fields import to_json
from vsae_jax.system import processes
from vsae_jax.system.errors import UserError
from vsae_jax.training.loop import run_arms
from vsae_jax.training.plan import PlannedRun, file_name, plan, run_name


def run(arms: Sequence[TrainConfig], *, names: Sequence[str] = ()) -> Path:
    """Trains all arms, or goes on where it was stopped. `names` are those of the arms'
    folders; unset, the swept fields and their values.

    Writes `grid.json` (the arms and the fields that differ between them) and, also when
    training ends early, `summary.csv` (those fields and each finished arm's last
    metrics).
    """
    swept = swept_fields(arms)
    unset = {name: getattr(TrainConfig(), name) for name in swept}
    common = run_name(dataclasses.replace(arms[0], **unset))
    folder = Path(arms[0].out or f"runs/grid_{'_'.join(swept)}_{common}")
    names = names or [arm_name(arm, swept) for arm in arms]
    arms = [
        dataclasses.replace(arm, out=str(folder / name))
        for arm, name in zip(arms, names, strict=True)
    ]
    # Every arm is checked before the first is trained.
    planned = [plan(arm) for arm in arms]
    processes.in_turn(_write_grid, folder, swept, arms)
    print(f"grid of {len(arms)} arms over {', '.join(swept)}, to {folder}")
    try:
        run_arms(planned)
    finally:
        rows = [
            _last_metrics(arm, swept=swept)
            for arm in planned
            if processes.first() and (arm.folder / runs.PARAMETERS).is_file()
        ]
        if rows:
            _write_summary(folder / runs.SUMMARY, rows)
    return folder


def swept_fields(arms: Sequence[TrainConfig]) -> list[str]:
    """The fields in which arms differ, in the order of the flags."""
    values = [to_json(arm) for arm in arms]
    return [name for name in values[0] if len({repr(v[name]) for v in values}) > 1]


def arm_name(arm: TrainConfig, swept: Sequence[str]) -> str:
    """`k-64_beta-0.1_seed-0`."""
    return file_name(f"{name}-{getattr(arm, name)}" for name in swept)


def _write_grid(
    folder: Path, swept: Sequence[str], arms: Sequence[TrainConfig]
) -> None:
    grid = {
        "swept": list(swept),
        "arms": [
            {"folder": Path(arm.out).name, **{n: getattr(arm, n) for n in swept}}
            for arm in arms
        ],
    }
    path = folder / runs.GRID
    if path.is_file() and not _holds(grid, runs.read_json(path)):
        raise UserError(
            f"{folder} holds another grid; give another --out, or the arms that it has "
            "and more values of the same flags"
        )
    if runs.holds_other_files(folder) and not path.is_file():
        raise UserError(f"--out={folder} is not empty and not a grid's folder")
    folder.mkdir(parents=True, exist_ok=True)
    runs.write_json(path, grid)


def _holds(grid: dict[str, Any], earlier: dict[str, Any]) -> bool:
    """Whether a grid has every arm of an earlier one: it may have grown, by another
    seed, say."""
    return bool(earlier.get("arms")) and all(
        any(had.items() <= arm.items() for arm in grid["arms"])
        for had in earlier["arms"]
    )


def _last_metrics(arm: PlannedRun, *, swept: Sequence[str]) -> dict[str, Any]:
    """A line of the summary: what the arm was asked for, and its last metrics. A swept
    field is as it was asked for: the last learning rate, say, has decayed."""
    lines = runs.read_metrics(arm.folder / runs.METRICS)
    if not lines:
        raise UserError(f"{arm.folder / runs.METRICS} has no line of metrics")
    asked = {name: getattr(arm.asked, name) for name in swept}
    return {"arm": arm.folder.name, **asked} | {
        name: value for name, value in lines[-1].items() if name not in asked
    }


def _write_summary(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    part = path.with_name(path.name + ".part")
    with part.open("w", newline="") as file:
        names = list(dict.fromkeys(name for row in rows for name in row))
        writer = csv.DictWriter(file, fieldnames=names)
        writer.writeheader()
        writer.writerows(rows)
    part.replace(path)
