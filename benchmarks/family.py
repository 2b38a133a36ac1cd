"""Every variant at one L0: held-out explained variance, latents alive, time of a step.

    python -m benchmarks.family --activations=DIR --out=DIR [--steps=2000] \\
        [--d_sae=512] [--batch_size=512] [--lr=1e-3] [--l0=32] [--seeds=3] \\
        [--rounds=7] [--max_norm_multiple=5] [--threshold_init=10]

trains a grid a variant below --out (what is there already is left), some seeds each.
Where k or a target sets L0, at that; where the weight of a penalty does, at several
weights, between whose results the table reads at --l0, on a line in log L0; of vaease,
whose weight is that of the evidence, between values of --closed_below. The same
learning rate, rows and steps for all; else --preset=paper. --max_norm_multiple is
train's, and rows that it leaves out are not measured on either. A step's time is that
of the compiled step alone, as a ratio to topk's in the same round; none is measured
with --rounds=0, and nothing else with --only_times.
"""

import argparse
import dataclasses
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vsae_jax import runs
from vsae_jax.activations.shards import Activations
from vsae_jax.autoencoder import sae
from vsae_jax.autoencoder.reader import Reader
from vsae_jax.config import TrainConfig, resolve_train, sae_config
from vsae_jax.runs.series import markdown, spread
from vsae_jax.training import step

ROWS = 50_000
# What decides L0: a number that is set to --l0, or weights to read between.
AT: dict[str, str] = {
    "topk": "k",
    "batch_topk": "k",
    "matryoshka": "k",
    "jump_relu": "target_l0",
    "vsae_topk": "k",
    "vsae_batch_topk": "k",
    "vsae_matryoshka": "k",
    "vsae_jump_relu": "target_l0",
}
WEIGHTS: dict[str, tuple[str, tuple[float, ...]]] = {
    "relu": ("l1", (8, 16, 32)),
    "gated": ("gate_l1", (16, 32, 64)),
    "vsae_gated": ("gate_l1", (16, 32, 64)),
}
CLOSED_BELOW = {"vaease": (0.05, 0.1, 0.2, 0.4, 0.6)}


class Point(NamedTuple):
    """What one run gives on held-out rows; alive: the share of latents that fire."""

    seed: int
    l0: float
    explained_variance: float
    alive: float


def main() -> None:
    """Trains what is missing, and prints the table."""
    flags = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for name in ("activations", "out"):
        flags.add_argument(f"--{name}", required=True)
    settings = {"steps": 2000, "d_sae": 512, "batch_size": 512, "l0": 32, "seeds": 3}
    settings["rounds"] = 7
    for name, value in settings.items():
        flags.add_argument(f"--{name}", type=int, default=value)
    flags.add_argument("--lr", type=float, default=1e-3)
    flags.add_argument("--max_norm_multiple", type=float)
    # Thresholds that start near 0 would need more steps to get where they end.
    flags.add_argument("--threshold_init", type=float, default=10)
    for name, weights in dict(WEIGHTS.values()).items():
        flags.add_argument(f"--{name}", default=",".join(map(str, weights)))
    every = [*AT, *WEIGHTS, *CLOSED_BELOW]
    flags.add_argument("--variants", default=",".join(every))
    flags.add_argument("--only_times", action="store_true")
    a = flags.parse_args()
    variants = a.variants.split(",")
    if a.only_times:
        times = step_times(variants, a)
        print(markdown([("variant", "step, times topk's"), *times.items()]))
        return
    for variant in variants:
        train(variant, a)
    times = step_times(variants, a)
    head = "variant | explained variance | L0 | alive | step, times topk's"
    table: list[Sequence[str]] = [head.split(" | ")]
    for variant in variants:
        points = [
            point(folder, closed_below=closed)
            for folder in runs.run_folders(Path(a.out) / variant)
            for closed in CLOSED_BELOW.get(variant, (0.0,))
        ]
        print(variant, *points, sep="\n  ")
        found = points if variant in AT else at_l0(points, a)
        columns = zip(*(p[1:] for p in found), strict=True) if found else ()
        l0, variance, alive = columns or ([], [], [])
        texts = (
            spread(variance, digits=3),
            spread(l0, digits=1),
            spread(alive, digits=2),
        )
        table.append((variant, *texts, times[variant]))
    print(markdown(table))


def train(variant: str, a: argparse.Namespace) -> None:
    """The grid of one variant, as the command would."""
    given = {"variant": variant, "activations": a.activations, "lr": a.lr}
    given |= {"steps": a.steps, "d_sae": a.d_sae, "batch_size": a.batch_size}
    given |= {"seed": ",".join(map(str, range(a.seeds))), "out": Path(a.out) / variant}
    given |= {"checkpoint_every": a.steps, "steps_per_dispatch": 50}
    if a.max_norm_multiple is not None:
        given["max_norm_multiple"] = a.max_norm_multiple
    if variant in AT:
        if AT[variant] == "target_l0":
            given["threshold_init"] = a.threshold_init
            given["bandwidth"] = a.threshold_init / 5
        given[AT[variant]] = a.l0
    if variant in WEIGHTS:
        name, _ = WEIGHTS[variant]
        given[name] = getattr(a, name)
    command = [sys.executable, "-m", "vsae_jax.train"]
    command += [f"--{name}={value}" for name, value in given.items()]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def point(folder: Path, *, closed_below: float) -> Point:
    """A run on the rows that it was not trained on."""
    run = runs.open_run(folder)
    assert run.train is not None
    activations = Activations.open(run.train.activations)
    start, stop = run.data["held_out_contexts"]
    first, last = (n * activations.rows_per_context for n in (start, stop))
    x = np.asarray(activations.rows(first, min(last, first + ROWS)), np.float32)
    if run.train.max_norm_multiple is not None:
        norms = np.linalg.norm(x, axis=1)
        x = x[norms <= run.train.max_norm_multiple * np.median(norms)]
    config = dataclasses.replace(run.config, closed_below=closed_below)
    return on_rows(Reader(run.variables, config), x, seed=run.train.seed)


def on_rows(reader: Reader, x: np.ndarray, *, seed: int) -> Point:
    """What an autoencoder gives on raw rows `[rows, d_model]`."""
    error, fired, alive = 0.0, 0, np.zeros(reader.config.d_sae, bool)
    for rows in np.array_split(x, max(len(x) // 2000, 1)):
        f = reader.encode(rows)
        error += float(np.square(rows - np.asarray(reader.decode(f))).sum())
        on = np.asarray(f) != 0
        fired, alive = fired + int(on.sum()), alive | on.any(axis=0)
    variance = float(np.square(x - x.mean(axis=0)).sum())
    return Point(seed, fired / len(x), 1 - error / variance, float(alive.mean()))


def at_l0(points: Sequence[Point], a: argparse.Namespace) -> list[Point]:
    """For each seed the point at --l0, between its two neighbours; none where it has
    none."""
    l0, found = a.l0, []
    for seed in range(a.seeds):
        own = sorted((p for p in points if p.seed == seed), key=lambda p: p.l0)
        pairs = zip(own[:-1], own[1:], strict=True)
        for low, high in (p for p in pairs if p[0].l0 <= l0 < p[1].l0):
            share = np.log(l0 / low.l0) / np.log(high.l0 / low.l0)
            mixed = [(1 - share) * x + share * y for x, y in zip(low[2:], high[2:])]
            found.append(Point(seed, l0, *map(float, mixed)))
    return found


def step_times(variants: Sequence[str], a: argparse.Namespace) -> dict[str, str]:
    """Median and quartiles of each variant's time over topk's, round by round."""
    if not a.rounds:
        return dict.fromkeys(variants, "-")
    compiled = {v: timed_step(v, a) for v in dict.fromkeys(["topk", *variants])}
    seconds: dict[str, list[float]] = {v: [] for v in compiled}
    for _ in range(a.rounds):
        for variant, run in compiled.items():
            start = time.perf_counter()
            run()
            seconds[variant].append(time.perf_counter() - start)
    texts = {}
    for variant in variants:
        pairs = zip(seconds[variant], seconds["topk"], strict=True)
        low, middle, high = statistics.quantiles((x / y for x, y in pairs), n=4)
        texts[variant] = f"{middle:.2f} ({low:.2f} to {high:.2f})"
    return texts


def timed_step(variant: str, a: argparse.Namespace) -> Any:
    """A function that runs twenty steps of a variant, compiled and once run."""
    d_model = Activations.open(a.activations).d_model
    sizes = {"d_sae": a.d_sae, "batch_size": a.batch_size, "steps": a.steps}
    config = resolve_train(TrainConfig(variant=variant, **sizes), d_model=d_model)
    static = sae_config(config, d_model=d_model, dtype="float32")
    weights, noise = jax.random.split(jax.random.key(0))
    state = step.init_state(sae.init(weights, static), noise, static)
    rng = np.random.default_rng(0)
    x = jnp.asarray(10 * rng.normal(size=(20, a.batch_size, d_model)), jnp.float32)
    steps, numbers = step.compile_steps(static), step.hparams(config)
    held = [steps(state, x, 20, numbers)]

    def run() -> None:
        held[0] = jax.block_until_ready(steps(held[0], x, 20, numbers))

    run()
    return run


if __name__ == "__main__":
    main()
