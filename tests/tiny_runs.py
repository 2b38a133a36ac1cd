"""Small folders made by the real commands: activations, a run, a grid of runs.

Each folder is made once a session (conftest.py hands the fixtures to all modules):
a test that changes one changes a copy (`copied`); one that does not is failed.
"""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from tiny_models import make_stories, make_tiny_neox, write_jsonl

from vsae_jax import (
    convert,
    dashboard,
    demo,
    evaluate,
    extract,
    features,
    maximise,
    plots,
    runs,
    train,
    tsne,
)
from vsae_jax.config import ConvertConfig, EvalConfig, ExtractConfig, TrainConfig, cli
from vsae_jax.training.plan import open_folder, plan

LENGTH, D_MODEL, D_SAE, CONTEXTS = 16, 16, 32, 80
COMMANDS = {
    "extract": (extract.command, ExtractConfig),
    "train": (train.command, TrainConfig),
    "evaluate": (evaluate.command, EvalConfig),
    "convert": (convert.command, ConvertConfig),
    "maximise": (maximise.command, maximise.MaximiseConfig),
    "tsne": (tsne.command, tsne.MapConfig),
    "plots": (plots.command, plots.PlotsConfig),
    "demo": (demo.command, demo.DemoConfig),
    "features": (features.command, features.FeaturesConfig),
    "dashboard": (dashboard.command, dashboard.DashboardConfig),
}
# 64 contexts of 15 rows are trained on, 16 are held out.
TRAINING = {"d_sae": D_SAE, "k": 4, "steps": 20, "batch_size": 32, "held_out": 0.2}


def call(name: str, *arguments: str, **flags: object) -> int:
    """The exit status of `python -m vsae_jax.<name> --flag=value ... arguments`."""
    command, config_class = COMMANDS[name]
    argv = [name, *(f"--{flag}={value}" for flag, value in flags.items()), *arguments]
    return cli.run(command, config_class, argv)


_shared: dict[Path, dict[str, int]] = {}


def shared(folder: Path) -> Path:
    """The folder, from now on one that no test may change."""
    _shared[folder] = sizes(folder)
    return folder


def changed() -> list[Path]:
    """The session's folders whose files have changed since they were last asked for."""
    before = dict(_shared)
    _shared.update({folder: sizes(folder) for folder in before})
    return [folder for folder in before if _shared[folder] != before[folder]]


def sizes(folder: Path) -> dict[str, int]:
    """Of every file below; looked at after each test, so in a quick way."""
    return {
        path: os.path.getsize(path)
        for below, _, names in os.walk(folder)
        for path in (f"{below}/{name}" for name in names)
    }


def copied(folder: Path, to: Path) -> Path:
    """A copy of a session's folder, to change."""
    return Path(shutil.copytree(folder, to))


def write_run(folder: Path, rows: Path, arrays: dict, **fields: object) -> Path:
    """A finished run folder with these parameters, its config made by `train`'s code;
    unnamed biases and mean are 0, the scale 1."""
    config = TrainConfig(
        activations=str(rows), out=str(folder), **{**TRAINING, **fields}
    )
    job = plan(config)
    assert open_folder(job)
    zeros = {"b_enc": np.zeros(job.sae.d_sae), "b_dec": np.zeros(D_MODEL)}
    norm = {"scale": np.float32(1), "mean": np.zeros(D_MODEL)}
    given = {name: arrays[name] for name in norm if name in arrays}
    params = zeros | {name: a for name, a in arrays.items() if name not in norm}
    variables = {"params": params, "norm": norm | given}
    runs.write_parameters(folder / runs.PARAMETERS, variables)
    return folder


def identity_arrays() -> dict[str, np.ndarray]:
    """relu(x) - relu(-x) = x: a `relu` autoencoder that changes nothing."""
    eye = np.eye(D_MODEL)
    return {"w_enc": np.hstack([eye, -eye]), "w_dec": np.vstack([eye, -eye])}


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    return make_tiny_neox(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def tiny_corpus(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    return write_jsonl(folder / "stories.jsonl", make_stories(200))


@pytest.fixture(scope="session")
def extracted(tmp_path_factory, tiny_model, tiny_corpus):
    """Makes a folder of activations of the tiny model, block 0; flags may differ."""

    def make(**flags: object) -> Path:
        out = tmp_path_factory.mktemp("rows") / "rows"
        arguments = {
            "model": tiny_model,
            "backend": "jax",
            "dataset": tiny_corpus,
            "num_tokens": CONTEXTS * LENGTH,
            "context_length": LENGTH,
            "dtype": "float32",
            "shard_contexts": 32,
            "out": out,
        }
        assert call("extract", **arguments | flags) == 0
        return shared(out)

    return make


@pytest.fixture(scope="session")
def tiny_rows(extracted) -> Path:
    return extracted()


@pytest.fixture(scope="session")
def tiny_run(tiny_rows, tmp_path_factory) -> Path:
    """A trained TopK."""
    out = tmp_path_factory.mktemp("run") / "topk"
    flags = {"activations": tiny_rows, "variant": "topk", "out": out, **TRAINING}
    assert call("train", **flags) == 0
    return shared(out)


@pytest.fixture(scope="session")
def tiny_grid(tiny_rows, tmp_path_factory) -> Path:
    """topk and vsae_topk, each with beta 0 and 2."""
    out = tmp_path_factory.mktemp("grid") / "grid"
    grid = {"variant": "topk,vsae_topk", "beta": "0,2"}
    assert call("train", activations=tiny_rows, out=out, **TRAINING, **grid) == 0
    return shared(out)
