"""Activations, a run and a grid that were written before the modules moved into rooms:
they open, go on from their checkpoints, and end as they did then."""

import json
import os
import platform
import subprocess
import sys
import tarfile
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from vsae_jax import runs
from vsae_jax.activations.shards import Activations

ROOT = Path(__file__).resolve().parents[1]
ARCHIVE = Path(__file__).parent / "data" / "before_the_move" / "folders.tar.xz"
# The flags that they were made with (the README beside the archive).
FLAGS = {"activations": "rows", "d_sae": 24, "k": 2, "steps": 20, "batch_size": 32}
FLAGS |= {"held_out": 0.2, "dead_after_tokens": 64, "checkpoint_every": 10}
FLAGS |= {"log_every": 5}
SWITCHES = {"grid": {"variant": "topk,vsae"}, "run": {"variance": "learned"}}
RUNS = ["grid/variant-topk", "grid/variant-vsae", "run"]


@pytest.fixture
def old(tmp_path, monkeypatch) -> Path:
    """The folders, unpacked; runs name their activations from there."""
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def lines(folder: Path) -> list[dict]:
    read = map(json.loads, (folder / runs.METRICS).read_text().splitlines())
    return [{n: v for n, v in line.items() if n != "rows_per_second"} for line in read]


def test_activations_open(old):
    rows = Activations.open(old / "rows")
    assert rows.manifest.complete
    assert (rows.manifest.n_rows, rows.manifest.d_model) == (600, 8)


@pytest.mark.parametrize("name", RUNS)
def test_a_finished_run_opens(old, name):
    run = runs.open_run(old / "finished" / name)
    written = load_file(old / "finished" / name / runs.PARAMETERS)
    read = run.variables["params"] | run.variables["norm"]
    assert read.keys() == written.keys()
    for array, values in written.items():
        np.testing.assert_array_equal(read[array], values, err_msg=array)


@pytest.mark.parametrize("of", SWITCHES)
def test_a_stopped_run_goes_on_and_ends_as_it_did(old, of):
    flags = FLAGS | SWITCHES[of] | {"out": f"stopped/{of}"}
    command = [sys.executable, "-m", "vsae_jax.train"]
    command += [f"--{name}={value}" for name, value in flags.items()]
    # Compiled as they were: without the tests' own flags (conftest.py).
    environment = {**os.environ, "XLA_FLAGS": "", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "going on from step 10" in done.stdout
    for name in (name for name in RUNS if name.startswith(of)):
        got, expected = (
            load_file(old / end / name / runs.PARAMETERS)
            for end in ("stopped", "finished")
        )
        assert got.keys() == expected.keys()
        for array, values in expected.items():
            assert_as_written(got[array], values, array)
        then, now = (lines(old / end / name) for end in ("finished", "stopped"))
        assert [line["step"] for line in then] == [line["step"] for line in now]
        # A column for each penalty, also of those that are younger than the run.
        younger = ("l0_loss", "gate_l1", "gate_error", "nested")
        columns = dict.fromkeys(younger, 0.0)
        assert columns | then[-1] == pytest.approx(now[-1], rel=1e-5)


def assert_as_written(got: np.ndarray, expected: np.ndarray, name: str) -> None:
    """Bit for bit where they were made; another jax or processor orders sums anew."""
    if (jax.__version__, platform.machine()) == ("0.10.2", "x86_64"):
        np.testing.assert_array_equal(got, expected, err_msg=name)
    else:
        np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-6, err_msg=name)
