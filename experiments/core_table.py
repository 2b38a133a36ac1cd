"""TopK against the paper's vSAE and the released code's vSAE, on core metrics.

Claim (Baker and Li 4.1): the vSAE is slightly worse on loss recovered and explained
variance, and 82 % of its features are dead (80 % where nothing is clipped,
docs/paper_and_code.md 4).

Command, for each grid of one preset and one layer (extract and train as in
docs/results.md):

    python -m vsae_jax.evaluate --run=GRID
    python -m experiments.core_table --grids=GRID,GRID,...

Prints one Markdown row per grid and variant: mean and standard deviation over seeds.
What was found is in docs/results.md.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vsae_jax import runs
from vsae_jax.config import cli
from vsae_jax.config.fields import flag
from vsae_jax.evaluate import COLUMNS
from vsae_jax.runs import series
from vsae_jax.system.errors import UserError


@dataclass(frozen=True)
class TableConfig:
    """Prints mean and standard deviation over seeds of evaluated grids."""

    grids: str = flag("comma list of grids' folders", "")


def command(configs: Sequence[TableConfig]) -> None:
    """Prints the table of the grids that `--grids` names."""
    if not configs[0].grids:
        raise UserError("--grids is not set; name the folders of evaluated grids")
    print(markdown([Path(name) for name in configs[0].grids.split(",")]))


def markdown(grids: Sequence[Path]) -> str:
    """`| grid | variant | seeds | metric ... |`, one row per grid and variant."""
    header = ["grid", "variant", "seeds", *COLUMNS.values()]
    rows = [header]
    for grid in grids:
        for variant, metrics in _by_variant(grid).items():
            cells = [series.spread([m[name] for m in metrics]) for name in COLUMNS]
            rows.append([grid.name, variant, str(len(metrics)), *cells])
    return series.markdown(rows)


def _by_variant(grid: Path) -> dict[str, list[dict[str, float]]]:
    """Core metrics of every evaluated arm, under its variant."""
    found: dict[str, list[dict[str, float]]] = {}
    for folder in runs.run_folders(grid):
        path = folder / runs.EVALS / "core.json"
        if not path.is_file():
            raise UserError(f"{folder} is not evaluated; run vsae_jax.evaluate on it")
        result = runs.read_json(path)
        found.setdefault(result["config"]["variant"], []).append(result["metrics"])
    return found


if __name__ == "__main__":
    cli.main(command, TableConfig)
