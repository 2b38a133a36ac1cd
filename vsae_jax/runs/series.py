"""The arms of a grid, grouped by what they were asked for: seeds of one series."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vsae_jax import runs
from vsae_jax.system.errors import UserError


class MissingFile(UserError):
    """A file is missing because a command was not run yet; the message names it."""


Series = dict[tuple[tuple[str, Any], ...], list["Arm"]]


class Arm(NamedTuple):
    """A run folder and what it was asked for: variant, k, and what its grid varies."""

    folder: Path
    settings: Mapping[str, Any]

    def read(self, *parts: str, made_by: str) -> dict[str, Any]:
        """A JSON file of the folder; `made_by` is the command that writes it."""
        return runs.read_json(self.path(*parts, made_by=made_by))

    def path(self, *parts: str, made_by: str) -> Path:
        """A file of the folder, which must be there."""
        path = self.folder.joinpath(*parts)
        if not path.is_file():
            raise MissingFile(
                f"{path} is not there; make it with: python -m vsae_jax.{made_by} "
                f"--run={self.folder}"
            )
        return path


def open_arms(folder: str | Path) -> list[Arm]:
    """The arms of a grid that did not diverge, or the one run."""
    folders = runs.run_folders(folder)
    grid = Path(folder) / runs.GRID
    swept = runs.read_json(grid).get("swept", []) if grid.is_file() else []
    return [Arm(arm, _settings(arm, swept)) for arm in folders]


def _settings(folder: Path, swept: Sequence[str]) -> dict[str, Any]:
    path = folder / runs.CONFIG
    train = runs.read_json(path).get("train") if path.is_file() else None
    train = train if isinstance(train, dict) else {}
    names = dict.fromkeys(["variant", "k", *swept])
    # An autoencoder that was not trained here is known only by its folder's name.
    return {"variant": folder.resolve().name, "k": None} | {
        name: train[name] for name in names if name in train
    }


def series_of(arms: Sequence[Arm], *, over: Sequence[str] = ("seed",)) -> Series:
    """Arms that differ in nothing but `over`, under what they share, in their order."""
    series: Series = {}
    for arm in arms:
        shared = tuple(
            (name, value) for name, value in arm.settings.items() if name not in over
        )
        series.setdefault(shared, []).append(arm)
    return series


def label(shared: Sequence[tuple[str, Any]]) -> str:
    """`vsae_topk, k 64, beta 0.1`."""
    words = [v if n == "variant" else f"{n} {v}" for n, v in shared if v is not None]
    return ", ".join(map(str, words))


def spread(values: Sequence[float | None], *, digits: int | None = None) -> str:
    """Mean ± standard deviation; `-` where a value is missing. By default there are
    four digits for numbers below 10 and one digit for others."""
    if not values or any(value is None for value in values):
        return "-"
    numbers = [value for value in values if value is not None]
    if digits is None:
        digits = 4 if max(map(abs, numbers)) < 10 else 1
    mean = f"{statistics.fmean(numbers):.{digits}f}"
    if len(numbers) == 1:
        return mean
    return f"{mean} ± {statistics.stdev(numbers):.{digits}f}"


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first row is its header."""
    lines = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
