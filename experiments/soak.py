"""Does an hour of training leak?

Claim: the memory and the open files of `vsae_jax.train` are flat from the first minute
to the last. Trains a TopK SAE at full speed in a process of its own, samples its
resident memory and open files, writes soak.csv and soak.svg, and exits with 2 if either
grew: the last quarter's median above that of the second quarter by more than 2 %
(memory) or by anything (files). The first quarter, in which caches fill, is left out.

Command, for an hour (`--minutes=60`), after an extraction as in docs/results.md:

    python -m experiments.soak --activations=DIR --out=NEW

Expected: both flat, exit status 0.
"""

import csv
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from vsae_jax import runs
from vsae_jax.config import cli
from vsae_jax.config.fields import check_above_zero, check_at_least, flag
from vsae_jax.system.errors import UserError

_MAY_GROW = 0.02


@dataclass(frozen=True)
class SoakConfig:
    """Trains for a while and fails if memory or open files grow."""

    activations: str = flag("folder that extract wrote", "")
    out: str = flag("new folder for the run, soak.csv and soak.svg", "soak")
    minutes: float = flag("how long to train", 60.0)
    every_s: float = flag("seconds between samples", 2.0)
    d_sae: int = flag("number of latents", 2048)
    batch_size: int = flag("rows in a step", 1024)
    checkpoint_every: int = flag("steps between checkpoints", 200)

    def __post_init__(self):
        check_above_zero(self, "minutes", "every_s")
        check_at_least(self, 1, "d_sae", "batch_size", "checkpoint_every")


class Sample(NamedTuple):
    """Of the training process, so many seconds after its start."""

    seconds: float
    resident_mb: float
    open_files: int
    step: int


def command(configs: Sequence[SoakConfig]) -> None:
    """Trains, samples and judges."""
    (config,) = configs
    out = Path(config.out)
    samples = soak(config, out / "run")
    write_csv(out / "soak.csv", samples)
    plot(out / "soak.svg", samples)
    print(f"wrote {out / 'soak.csv'} and soak.svg: {len(samples)} samples")
    grown = [verdict(samples, name) for name in ("resident_mb", "open_files")]
    if any(grown):
        raise UserError("; ".join(text for text in grown if text))


def soak(config: SoakConfig, run: Path) -> list[Sample]:
    """Samples from the first step until the time is over; then stops the training."""
    names = ("activations", "d_sae", "batch_size", "checkpoint_every")
    flags = [f"--{name}={getattr(config, name)}" for name in names]
    flags += [f"--out={run}", "--variant=topk", "--k=32", "--steps=100000000"]
    flags += ["--dead_after_tokens=1000000", "--log_every=100"]
    process = subprocess.Popen([sys.executable, "-m", "vsae_jax.train", *flags])
    samples, began = [], 0.0
    try:
        while not began or time.monotonic() - began < 60 * config.minutes:
            time.sleep(config.every_s)
            if process.poll() is not None:
                raise UserError(f"the training ended with {process.returncode}")
            step = last_step(run)
            if step:
                began = began or time.monotonic()
                samples.append(sample(process.pid, time.monotonic() - began, step))
    finally:
        process.send_signal(signal.SIGTERM)
        status = process.wait()
    if status != 128 + signal.SIGTERM:
        raise UserError(f"the training ended with {status}, not by the signal")
    return samples


def last_step(run: Path) -> int:
    """Of metrics.jsonl; 0 before its first line."""
    path = run / runs.METRICS
    lines = runs.read_metrics(path) if path.is_file() else []
    return lines[-1]["step"] if lines else 0


def sample(pid: int, seconds: float, step: int) -> Sample:
    """Resident memory and open files from /proc."""
    status = Path(f"/proc/{pid}/status").read_text().splitlines()
    (line,) = [x for x in status if x.startswith("VmRSS:")]
    files = len(os.listdir(f"/proc/{pid}/fd"))
    return Sample(seconds, int(line.split()[1]) / 1024, files, step)


def verdict(samples: Sequence[Sample], name: str) -> str:
    """What grew, or an empty string."""
    values = [getattr(s, name) for s in samples]
    quarter = len(values) // 4
    if quarter < 2:
        raise UserError(f"{len(values)} samples are too few; give more --minutes")
    early = statistics.median(values[quarter : 2 * quarter])
    late = statistics.median(values[-quarter:])
    print(f"{name}: second quarter {early:.1f}, last quarter {late:.1f}")
    may_grow = _MAY_GROW if name == "resident_mb" else 0.0
    return (
        f"{name} grew from {early} to {late}" if late > early * (1 + may_grow) else ""
    )


def write_csv(path: Path, samples: Sequence[Sample]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(Sample._fields)
        writer.writerows([round(v, 3) for v in s] for s in samples)


def plot(path: Path, samples: Sequence[Sample]) -> None:
    """Memory and open files against minutes."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, sharex=True, figsize=(7, 4))
    minutes = [s.seconds / 60 for s in samples]
    for axis, name in zip(axes, ("resident_mb", "open_files"), strict=True):
        values = [getattr(s, name) for s in samples]
        axis.plot(minutes, values)
        axis.set_ylabel(name.replace("_", " "))
        axis.set_ylim(0, 1.2 * max(values))
    axes[1].set_xlabel(f"minutes ({samples[-1].step:,} steps)")
    figure.savefig(path)


if __name__ == "__main__":
    cli.main(command, SoakConfig)
