"""Does `--preset=released --variant=vsae_topk` train what the authors' trainer trains?

    python -m benchmarks.released --activations=DIR --authors=FOLDER \\
        --peer_python=PYTHON --out=NEW_DIR --seed=0,1,2

FOLDER is a checkout of ZachData/SPAR-Variational-Sparse-Autoencoders at 8e1581a; PYTHON
has torch and einops (pip install torch==2.13.0 einops numpy) and runs
`released_peer.py`. Both train in float32 on the same batches in the same order, theirs
once from our first weights and once from its own. Their warm-ups and decay are those
that their trainer chooses, and must be ours. (Ours is one step ahead in the warm-up:
its first rate is a step's share of the peak, theirs is 0.) Our core evaluation reads
all of them on the same held-out contexts.
"""

import dataclasses
import json
import statistics
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

import vsae_jax
from benchmarks.table import markdown
from benchmarks.turns import ROOT
from vsae_jax import lm, runs, train
from vsae_jax.config import EvalConfig, TrainConfig, cli
from vsae_jax.config.fields import check_at_least, flag
from vsae_jax.evals import core
from vsae_jax.evals.quirks import Quirks
from vsae_jax.runs.opening import subject_of
from vsae_jax.system.errors import UserError
from vsae_jax.training.batches import Feed
from vsae_jax.training.plan import PlannedRun, first_state, plan
from vsae_jax.training.step import variables

OURS, SAME, OWN = "ours", "theirs, our first weights", "theirs, own first weights"
_TRAINER = "dictionary_learning/trainers/vsae_topk.py"
# Below it their trainer, which warms up over at least 200 steps, never decays.
_LEAST_STEPS = 252
_METRICS = {
    "explained_variance": "explained variance",
    "frac_alive": "alive",
    "entropy_effective_latents": "effective latents",
}
# Metrics of each arm by their names.
Found = Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class ReleasedConfig:
    """Trains the released vSAE by us and by its authors' trainer, and compares."""

    activations: str = flag("folder that extract --preset=released wrote", "")
    authors: str = flag("checkout of the authors' repository", "")
    peer_python: str = flag("interpreter that has torch and einops", "")
    out: str = flag("new folder for the trained autoencoders and results.json", "")
    d_sae: int = flag("number of latents", 1024)
    k: int = flag("latents kept per row", 32)
    steps: int = flag("optimizer steps", 2000)
    batch_size: int = flag("rows in a step", 192)
    seed: int = flag("of the weights and the order of the rows", 0, grid=True)

    def __post_init__(self):
        check_at_least(self, 1, "d_sae", "k", "batch_size")
        check_at_least(self, 0, "seed")
        if self.k > self.d_sae:
            raise UserError(f"--k={self.k} must not exceed --d_sae={self.d_sae}")
        if self.steps < _LEAST_STEPS:
            raise UserError(
                f"--steps={self.steps} must be at least {_LEAST_STEPS}: the authors' "
                "trainer warms up over 200 steps and in fewer has another schedule"
            )
        if not Path(self.activations, "manifest.json").is_file():
            raise UserError(
                f"--activations={self.activations!r} holds no activations; name a "
                "folder that vsae_jax.extract --preset=released wrote"
            )
        if not Path(self.authors, _TRAINER).is_file():
            raise UserError(
                f"--authors={self.authors!r} has no {_TRAINER}; name a checkout of "
                "ZachData/SPAR-Variational-Sparse-Autoencoders"
            )
        if not Path(self.peer_python).is_file():
            raise UserError(
                f"--peer_python={self.peer_python!r} is no interpreter; name one that "
                "has torch and einops"
            )
        if not self.out or Path(self.out).exists():
            raise UserError(f"--out={self.out!r} must name a folder that is not there")


def command(configs: Sequence[ReleasedConfig]) -> None:
    """Prints a table of every arm and one of the differences; `results.json` has every
    seed as soon as it is done."""
    by_seed: dict[int, Found] = {}
    for config in configs:
        by_seed[config.seed] = measure(config)
        path = Path(config.out, "results.json")
        path.write_text(json.dumps(by_seed, indent=1) + "\n")
    for title, rows in tables(list(by_seed.values())).items():
        print(f"\n{title}\n\n{markdown(rows)}")


def measure(config: ReleasedConfig) -> Found:
    """The held-out metrics of the three arms of one seed."""
    folder = Path(config.out, f"seed-{config.seed}").resolve()
    asked = TrainConfig(
        activations=config.activations,
        out=str(folder / "ours"),
        preset="released",
        variant="vsae_topk",
        d_sae=config.d_sae,
        k=config.k,
        steps=config.steps,
        batch_size=config.batch_size,
        seed=config.seed,
        data_seed=config.seed,
        dtype="float32",
    )
    planned = plan(asked)
    folder.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as scratch:
        checkout = str(Path(config.authors).resolve())
        task = hand_over(planned, Path(scratch)) | {"authors": checkout}
        train_theirs(config, task | {"out": str(folder / "theirs-same")})
        train_theirs(config, task | {"out": str(folder / "theirs-own"), "start": ""})
    train.run(asked)
    return evaluated(
        folder / "ours",
        {SAME: folder / "theirs-same", OWN: folder / "theirs-own"},
    )


def hand_over(planned: PlannedRun, folder: Path) -> dict[str, Any]:
    """The task of `released_peer.py`, for which it writes our batches in their order,
    `[steps, batch, d_model]` in float32, and our first weights into `folder`."""
    c, rows_path, start = planned.train, folder / "rows.npy", folder / "start.npz"
    rows = np.lib.format.open_memmap(
        rows_path,
        mode="w+",
        dtype=np.float32,
        shape=(c.steps, c.batch_size, planned.sae.d_model),
    )
    with Feed(planned) as feed:
        for step in range(c.steps):
            rows[step] = np.asarray(feed.stack(step * c.batch_size, 1, n_max=1)[0])
    rows.flush()
    first = variables(first_state(planned, None), planned.sae)
    np.savez(start, **{name: np.asarray(a) for name, a in first["params"].items()})
    return {
        "rows": str(rows_path),
        "start": str(start),
        "norm": 1 / float(first["norm"]["scale"]),
        "layer": planned.data["layer"],
        "d_sae": c.d_sae,
        "k": c.k,
        "seed": c.seed,
        # What their script gives their trainer; the rest is the trainer's own choice.
        "training": {
            "steps": c.steps,
            "lr": c.lr,
            "kl_coeff": c.beta,
            "auxk_alpha": c.auxk,
        },
        "expected": {
            "warmup_steps": c.lr_warmup_steps,
            "decay_start": c.lr_decay_start,
            "kl_warmup_steps": c.kl_warmup_steps,
            "gradient_clip_norm": c.clip_norm,
        },
    }


def train_theirs(config: ReleasedConfig, task: Mapping[str, Any]) -> None:
    """Trains with the authors' trainer, under the peer's interpreter."""
    # Not resolved: a virtual environment's interpreter is a link.
    python = Path(config.peer_python).absolute()
    command = [python, "-m", "benchmarks.released_peer", json.dumps(task)]
    done = subprocess.run(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["nothing was said"])[-1]
        raise UserError(f"the authors' trainer under {config.peer_python}: {last}")


def evaluated(ours: Path, theirs: Mapping[str, Path]) -> Found:
    """Core metrics of our run and of what their trainer saved, on the held-out contexts
    of our run."""
    run, load = runs.open_run(ours), cache(lm.load_language_model)
    saved = [
        dataclasses.replace(vsae_jax.load(folder), data=run.data, train=run.train)
        for folder in theirs.values()
    ]
    options = EvalConfig(run=str(ours))
    subjects = [subject_of(each, options, load) for each in (run, *saved)]
    core.check(subjects)
    results = core.run(subjects, Quirks())
    return {
        arm: {name: result["metrics"][name] for name in _METRICS}
        for arm, result in zip((OURS, *theirs), results, strict=True)
    }


def tables(seeds: Sequence[Found]) -> dict[str, list[dict[str, str]]]:
    """Rows of two tables by their titles: mean and standard deviation over the seeds of
    each arm, and of ours minus theirs, seed by seed."""
    return {
        f"mean and standard deviation, seeds: {len(seeds)}": [
            {"": arm}
            | {t: _spread([s[arm][m] for s in seeds]) for m, t in _METRICS.items()}
            for arm in seeds[0]
        ],
        "ours minus theirs, seed by seed": [
            {"": f"ours - {arm}"}
            | {
                title: _spread([s[OURS][metric] - s[arm][metric] for s in seeds])
                for metric, title in _METRICS.items()
            }
            for arm in (SAME, OWN)
        ],
    }


def _spread(values: Sequence[float]) -> str:
    sd = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.4f}{sd}"


if __name__ == "__main__":
    cli.main(command, ReleasedConfig)
