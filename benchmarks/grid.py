"""`python -m benchmarks.grid`: sixteen arms as one grid against sixteen single runs.

All through `python -m vsae_jax.train` on real activations. Two times are given: of
whole processes, and from the first line of metrics.jsonl to the last, which is without
start, compilation and the final checkpoint. The grid runs between the two halves of the
single runs, so that a machine that slows down slows both.
"""

import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from benchmarks.table import markdown
from benchmarks.turns import ROOT
from vsae_jax import runs
from vsae_jax.config import cli
from vsae_jax.config.fields import check_at_least, flag
from vsae_jax.system.errors import UserError

_SWEPT: tuple[str, ...] = ("variant", "k", "beta", "seed")
_LINES = 10
_POLL_SECONDS = 0.02


@dataclass(frozen=True)
class GridConfig:
    """Times one grid of training runs against its arms as single runs."""

    activations: str = flag("folder that extract wrote", "")
    variant: str = flag("comma list", "topk,vsae_topk")
    k: str = flag("comma list", "64,128")
    beta: str = flag("comma list", "0.1,1")
    seed: str = flag("comma list", "0,1")
    d_sae: int = flag("number of latents", 2048)
    steps: int = flag("optimizer steps of each arm", 100)
    batch_size: int = flag("rows in a step", 1024)
    dtype: str = flag("of the matrix products: float32 or bfloat16", "bfloat16")
    out: str = flag("JSON file for what was measured", "")

    def __post_init__(self):
        check_at_least(self, 1, "d_sae", "batch_size")
        check_at_least(self, 2 * _LINES, "steps")
        if not Path(self.activations, "manifest.json").is_file():
            raise UserError(
                f"--activations={self.activations!r} holds no activations; name a "
                "folder that vsae_jax.extract wrote"
            )


class Process(NamedTuple):
    """Seconds of a whole process, seconds from its first line of metrics to its last,
    and its largest resident set in bytes."""

    seconds: float
    training_seconds: float
    peak_bytes: int


def command(configs: Sequence[GridConfig]) -> None:
    """Prints both times, their ratio and the memory of an arm."""
    config = configs[0]
    lists = [getattr(config, name).split(",") for name in _SWEPT]
    arms = [dict(zip(_SWEPT, row, strict=True)) for row in itertools.product(*lists)]
    half = len(arms) // 2
    with tempfile.TemporaryDirectory() as folder:

        def single(arm: dict[str, str]) -> Process:
            return train(config, arm, Path(folder, "_".join(arm.values())))

        singles = [single(arm) for arm in arms[:half]]
        swept = {name: getattr(config, name) for name in _SWEPT}
        grid = train(config, swept, Path(folder, "grid"))
        singles += [single(arm) for arm in arms[half:]]
    report(config, singles, grid)


def train(config: GridConfig, flags: dict[str, str], out: Path) -> Process:
    """One process of `vsae_jax.train`."""
    shared = ("activations", "d_sae", "steps", "batch_size", "dtype")
    flags = {name: str(getattr(config, name)) for name in shared} | flags
    flags["activations"] = str(Path(config.activations).resolve())
    flags |= {"out": str(out), "log_every": str(config.steps // _LINES)}
    arguments = [f"--{name}={value}" for name, value in flags.items()]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "vsae_jax.train", *arguments],
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
        )
        measured, status = _watch(process, out)
        if status:
            log.seek(0)
            last = log.read().strip().splitlines()[-1:]
            raise UserError(f"training failed with {' '.join(arguments)}: {last}")
    return measured


def _watch(process: subprocess.Popen, out: Path) -> tuple[Process, int]:
    start, first = time.time(), 0.0
    while True:
        pid, status, usage = os.wait4(process.pid, os.WNOHANG)
        written = _metrics_times(out)
        first = first or min(written, default=0.0)
        if pid:
            break
        time.sleep(_POLL_SECONDS)
    process.returncode = os.waitstatus_to_exitcode(status)
    training = max(written, default=0.0) - first
    # Linux counts it in KiB, macOS in bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    measured = Process(time.time() - start, training, usage.ru_maxrss * unit)
    return measured, process.returncode


def _metrics_times(out: Path) -> list[float]:
    """When each metrics.jsonl that has a line was last written to."""
    paths = [out / runs.METRICS, *out.glob(f"*/{runs.METRICS}")]
    stats = [path.stat() for path in paths if path.is_file()]
    return [stat.st_mtime for stat in stats if stat.st_size]


def report(config: GridConfig, singles: Sequence[Process], grid: Process) -> None:
    """Prints and writes what was measured."""
    count = len(singles)
    whole = sum(run.seconds for run in singles)
    training = sum(run.training_seconds for run in singles)
    peak = max(run.peak_bytes for run in singles)
    names = ("", "whole processes s", "training s", "peak GB")
    cells = [
        (f"{count} single runs", whole, training, peak / 1e9),
        ("one grid", grid.seconds, grid.training_seconds, grid.peak_bytes / 1e9),
        (
            "grid / single runs",
            grid.seconds / whole,
            grid.training_seconds / training,
            grid.peak_bytes / peak,
        ),
    ]
    print(markdown([dict(zip(names, row, strict=True)) for row in cells]))
    per_arm = (grid.peak_bytes - peak) / max(count - 1, 1) / 1e6
    steps = config.steps - config.steps // _LINES
    print(f"\n{1e3 * training / count / steps:.1f} ms a step of a single run, ", end="")
    print(f"{1e3 * grid.training_seconds / count / steps:.1f} ms of an arm")
    print(f"{per_arm:.0f} MB for each further arm, load {os.getloadavg()[0]:.1f}")
    if config.out:
        record = {
            "config": asdict(config),
            "single_runs": [run._asdict() for run in singles],
            "grid": grid._asdict(),
        }
        Path(config.out).write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    cli.main(command, GridConfig)
