"""More than one device: a run on eight, on two processes, and on one are the same run.

What needs several devices runs in processes of its own, since XLA counts its devices
when JAX starts: `mesh_cases.py`, and the commands themselves.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from mesh_cases import CASES
from safetensors.numpy import load_file
from tiny_runs import LENGTH, TRAINING, call

from vsae_jax import runs
from vsae_jax.activations.shared_shards import SharedShardWriter
from vsae_jax.activations.shuffle import Part, ShuffledRows
from vsae_jax.config import SAEConfig, TrainConfig
from vsae_jax.system import mesh, processes
from vsae_jax.system.errors import UserError
from vsae_jax.training import groups, layout, plan

ROOT = Path(__file__).resolve().parents[1]
# Float32 sums of other orders; measured below 1e-6 (docs/results.md).
CLOSE = 1e-5
FAST = ["topk", "batch_topk with auxk"]


def started(*argv: object, devices: int, **variables: str) -> subprocess.Popen[str]:
    """A Python process that sees this many CPU devices."""
    count = f"--xla_force_host_platform_device_count={devices}"
    flags = f"{os.environ.get('XLA_FLAGS', '')} {count}"
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    environment |= variables
    return subprocess.Popen(
        [sys.executable, *map(str, argv)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=environment | {"PYTHONPATH": str(ROOT)},
    )


def said(*processes: subprocess.Popen, status: int = 0) -> list[str]:
    """What each process printed, once all have ended with this status."""
    ends = [process.communicate(timeout=300) for process in processes]
    for process, (_, errors) in zip(processes, ends, strict=True):
        assert process.returncode == status, errors
    return [out if status == 0 else errors for out, errors in ends]


def flags(command: str, **values: object) -> list[str]:
    given = [f"--{name}={value}" for name, value in values.items()]
    return ["-m", f"vsae_jax.{command}", *given]


def free_address() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


def two_processes(command: str, devices: int = 1, **values: object) -> list[str]:
    """What two processes of one run print."""
    together = {"coordinator": free_address(), "num_processes": 2}
    return said(
        *(
            started(
                *flags(command, **values, **together, process_id=i), devices=devices
            )
            for i in range(2)
        )
    )


def assert_close(one: Path, many: Path) -> None:
    """The same parameters to 1e-5 of each array's largest, and the same metrics."""
    a, b = load_file(one / runs.PARAMETERS), load_file(many / runs.PARAMETERS)
    assert a.keys() == b.keys()
    for name, array in a.items():
        atol = CLOSE * np.abs(array).max()
        np.testing.assert_allclose(b[name], array, rtol=0, atol=atol, err_msg=name)
    lines = [
        [json.loads(line) for line in (folder / runs.METRICS).read_text().splitlines()]
        for folder in (one, many)
    ]
    for x, y in zip(*lines, strict=True):
        assert x.pop("rows_per_second") > 0 < y.pop("rows_per_second")
        assert y == pytest.approx(x, rel=1e-4, abs=1e-6)


def as_if_killed_after(step: int, folder: Path, to: Path) -> Path:
    """A copy of a run's folder as a kill after the checkpoint of `step` leaves it."""
    shutil.copytree(folder, to)
    (to / runs.PARAMETERS).unlink()
    for checkpoint in (to / runs.CHECKPOINTS).iterdir():
        if int(checkpoint.name) > step:
            shutil.rmtree(checkpoint)
    return to


TRAINED = TRAINING | {"checkpoint_every": 10, "log_every": 5}


@pytest.fixture(scope="module")
def on_one(tiny_rows, tmp_path_factory) -> Path:
    """The paper's vSAE on one device."""
    out = tmp_path_factory.mktemp("one") / "run"
    assert call("train", activations=tiny_rows, out=out, **TRAINED) == 0
    return out


@pytest.fixture(scope="module")
def on_eight(tiny_rows, tmp_path_factory) -> Path:
    """The same on eight devices."""
    out = tmp_path_factory.mktemp("eight") / "run"
    values = {"activations": tiny_rows, "out": out, "mesh": "data:4,latents:2"}
    (text,) = said(started(*flags("train", **values, **TRAINED), devices=8))
    assert "8 x cpu (data:4,latents:2)" in text
    assert "memory of each device (data:4,latents:2): states" in text
    return out


def test_a_run_on_eight_devices_is_the_run_on_one(on_one, on_eight):
    assert_close(on_one, on_eight)


def test_saved_on_eight_resumed_on_one(on_one, on_eight, tiny_rows, tmp_path, capsys):
    folder = as_if_killed_after(10, on_eight, tmp_path / "run")
    assert call("train", activations=tiny_rows, out=folder, **TRAINED) == 0
    assert "going on from step 10" in capsys.readouterr().out
    assert_close(on_one, folder)


def test_saved_on_eight_resumed_by_two_processes(on_one, on_eight, tiny_rows, tmp_path):
    folder = as_if_killed_after(10, on_eight, tmp_path / "run")
    values = {"activations": tiny_rows, "out": folder, "mesh": "latents:2"}
    first, second = two_processes("train", **values, **TRAINED)
    assert "2 x cpu (data:1,latents:2)" in first and "going on from step 10" in first
    assert "step" not in second
    assert_close(on_one, folder)


@pytest.mark.slow
def test_saved_on_eight_resumed_on_two(on_one, on_eight, tiny_rows, tmp_path):
    folder = as_if_killed_after(10, on_eight, tmp_path / "run")
    values = {"activations": tiny_rows, "out": folder, "feed": "device"}
    said(started(*flags("train", **values, **TRAINED), devices=2))
    assert_close(on_one, folder)


@pytest.mark.slow
@pytest.mark.parametrize(
    "shape, devices",
    [("data:2", 1), ("data:4,latents:2", 4), ("data:2,latents:4", 4)],
)
def test_two_processes_are_one(shape, devices, on_one, tiny_rows, tmp_path):
    folder = tmp_path / "run"
    values = {"activations": tiny_rows, "out": folder, "mesh": shape}
    two_processes("train", devices, **values, **TRAINED)
    assert_close(on_one, folder)


@pytest.mark.slow
def test_a_grid_by_two_processes(tiny_grid, tiny_rows, tmp_path):
    folder = tmp_path / "grid"
    grid = {"variant": "topk,vsae_topk", "beta": "0,2", "arms": "vmap"}
    values = {"activations": tiny_rows, "out": folder, "mesh": "data:2,latents:2"}
    two_processes("train", 2, **values, **TRAINING, **grid)
    for one in runs.run_folders(tiny_grid):
        assert_close(one, folder / one.name)
    summary = (folder / runs.SUMMARY).read_text().splitlines()
    assert len(summary) == 5


def differences(shape: str, *names: str) -> dict[str, dict[str, float]]:
    script = ROOT / "tests" / "mesh_cases.py"
    (text,) = said(started(script, shape, *names, devices=8))
    return of_lines(text)


def of_lines(text: str) -> dict[str, dict[str, float]]:
    """Every case's result; the lines may stand between others."""
    found = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
    return {name: case for line in found for name, case in line.items()}


def check(found: dict[str, dict[str, float]]) -> None:
    for name, case in found.items():
        # Operands of bfloat16 are rounded on either side of a border now and then.
        limit = 2e-3 if name == "bfloat16" else CLOSE
        assert case["parameters"] < limit and case["loss"] < limit, (name, case)
        assert case["buffers"] < 1e-4, (name, case)
        assert case["silence"] == 0 and case["steps"] == 20, (name, case)
        assert (case["auxk"] > 0) == ("auxk" in name or name == "topk"), (name, case)


def test_variants_on_eight_devices():
    found = differences("data:2,latents:4", *FAST, "top_k")
    selected = found.pop("top_k")
    assert selected["rows"] > 3000 and selected["different"] == 0
    assert list(found) == FAST
    check(found)


def differences_of_two_processes(shape: str, *names: str) -> None:
    """Two interpreters, whose sets have different orders, against one."""
    script, address = ROOT / "tests" / "mesh_cases.py", free_address()
    text, silent = said(
        *(
            started(
                script,
                shape,
                *names,
                devices=1,
                PROCESS=f"{address},2,{i}",
                PYTHONHASHSEED=str(i),
            )
            for i in range(2)
        )
    )
    assert "{" not in silent
    found = of_lines(text)
    assert list(found) == list(names)
    check(found)


def test_kl_and_an_acting_auxk_by_two_processes():
    differences_of_two_processes("data:2", "kl and auxk")


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["data:2", "latents:2"])
def test_every_variant_by_two_processes(shape):
    differences_of_two_processes(shape, *CASES, "grid")


@pytest.mark.slow
@pytest.mark.parametrize(
    "shape", ["data:4,latents:2", "data:8", "latents:8", "data:2,latents:4"]
)
def test_every_variant_on_eight_devices(shape):
    check(differences(shape, *CASES, "grid"))


def extraction(model: Path, corpus: Path, out: Path) -> dict[str, object]:
    return {
        "model": model,
        "backend": "jax",
        "dataset": corpus,
        "num_tokens": 40 * LENGTH,
        "context_length": LENGTH,
        "shard_contexts": 9,
        "out": out,
    }


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.mark.parametrize(
    "hooks, files", [({}, 11), ({"layer": "0,1", "site": "mlp_out,resid_post"}, 44)]
)
def test_two_processes_extract_the_same_bytes(
    tiny_model, tiny_corpus, tmp_path, hooks, files
):
    one, two = tmp_path / "one", tmp_path / "two"
    assert call("extract", **extraction(tiny_model, tiny_corpus, one), **hooks) == 0
    two_processes("extract", **extraction(tiny_model, tiny_corpus, two), **hooks)
    assert contents(one) == contents(two) and len(contents(one)) == files


def test_one_process_goes_on_where_one_of_two_was_stopped(
    tiny_model, tiny_corpus, tmp_path, monkeypatch
):
    """The first of two has written its shards, the second none."""
    one, two = tmp_path / "one", tmp_path / "two"
    assert call("extract", **extraction(tiny_model, tiny_corpus, one)) == 0

    def stopped(self):
        raise UserError("stopped")

    with monkeypatch.context() as patch:
        patch.setattr(processes, "count", lambda: 2)
        patch.setattr(processes, "wait", lambda where: None)
        patch.setattr(processes, "agreed", lambda number: number)
        patch.setattr(SharedShardWriter, "finish", stopped)
        assert call("extract", **extraction(tiny_model, tiny_corpus, two)) == 2
    there = {path.name: path.stat().st_mtime_ns for path in two.glob("*.npy")}
    assert "tokens-00002.npy" in there and "tokens-00001.npy" not in there
    assert call("extract", **extraction(tiny_model, tiny_corpus, two)) == 0
    assert contents(one) == contents(two)
    for name, time in there.items():
        assert (two / name).stat().st_mtime_ns == time


SHAPES = [
    ("", {"data": 8, "latents": 1}),
    ("data:8", {"data": 8, "latents": 1}),
    ("latents:8", {"data": 1, "latents": 8}),
    ("latents:4, data:2", {"data": 2, "latents": 4}),
]


@pytest.mark.parametrize("text, expected", SHAPES)
def test_sizes_of_a_mesh(text, expected):
    assert mesh.sizes(text, n_devices=8) == expected


@pytest.mark.parametrize(
    "text, named",
    [
        ("data:3", "a mesh of 3 devices and there are 8"),
        ("data:4,latents:4", "a mesh of 16 devices and there are 8"),
        ("data:4,model:2", "model:2 is wrong; the axes are data and latents"),
        ("data:4,data:2", "data:2 is wrong"),
        ("data:0,latents:8", "data:0 is wrong"),
        ("4x2", "not of the form data:4,latents:2"),
        ("data:8,", "not of the form"),
        ("data:-8", "not of the form"),
    ],
)
def test_a_wrong_mesh(text, named):
    with pytest.raises(UserError, match=named) as error:
        mesh.sizes(text, n_devices=8)
    assert f"--mesh={text}" in str(error.value)


def test_what_does_not_divide_is_refused():
    class Eight:
        shape = {"data": 4, "latents": 2}

    mesh.check(Eight(), d_sae=32, batch_size=16)
    with pytest.raises(UserError, match="--d_sae=33 must be a multiple of 2"):
        mesh.check(Eight(), d_sae=33, batch_size=16)
    with pytest.raises(UserError, match="--batch_size=18 must be a multiple of 4"):
        mesh.check(Eight(), d_sae=32, batch_size=18)


PROCESSES = [
    ({"num_processes": 2}, "--num_processes=2 needs --coordinator=HOST:PORT"),
    ({"process_id": 0}, "--process_id=0 needs --coordinator"),
    ({"coordinator": "host"}, "--coordinator=host is not HOST:PORT"),
    ({"coordinator": "h:1", "process_id": 0}, "needs --num_processes too"),
    ({"coordinator": "h:1", "num_processes": 2}, "needs --process_id too"),
    (
        {"coordinator": "h:1", "num_processes": 2, "process_id": 2},
        "--process_id=2 must lie between 0 and --num_processes=2",
    ),
    ({"coordinator": "auto", "process_id": 1}, "--process_id=1 needs --coordinator"),
]


@pytest.mark.parametrize("values, named", PROCESSES)
def test_incomplete_process_flags(values, named):
    with pytest.raises(UserError, match=named):
        TrainConfig(**values)


def test_one_device_has_no_mesh(tiny_rows):
    assert mesh.open_mesh("") is None and mesh.open_mesh("data:1") is None
    planned = plan.plan(TrainConfig(activations=str(tiny_rows), **TRAINING))
    assert planned.mesh is None


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_parts_of_a_stream_are_the_stream(parts):
    """Every process's rows, side by side, are the batches; across groups and epochs,
    and each row is read by its own process only."""
    data = np.arange(100_000, dtype=np.int64)[:, None] * np.ones((1, 256), np.int64)
    read = {"read": lambda start, stop: data[start:stop], "n_rows": 100_000}
    order = read | {"row_bytes": 2**14, "seed": 3}
    batch, own = 16, 16 // parts
    streams = [
        ShuffledRows(**order, part=Part(batch, i * own, (i + 1) * own))
        for i in range(parts)
    ]
    whole = ShuffledRows(**order)
    for position in range(0, 3 * 100_000, 7 * 4096 + 16 * 5):
        position -= position % batch
        expected = whole.take(position, 4 * batch).reshape(4, batch, -1)
        taken = [s.take(position, 4 * batch).reshape(4, own, -1) for s in streams]
        np.testing.assert_array_equal(np.concatenate(taken, axis=1), expected)
    for stream in streams:
        assert len(stream.present.rows) <= (32768 // batch + 2) * own


def test_an_arm_takes_its_share_on_each_device():
    """What is foreseen: parameters by the latents' devices, rows by the data's."""
    config = SAEConfig(d_model=64, d_sae=4096)
    mesh: Any = SimpleNamespace(shape={"data": 4, "latents": 2})
    whole, share = (
        groups.bytes_of_one(config, batch_size=0, mesh=m) for m in (None, mesh)
    )
    # b_dec, its gradient, moments and update are whole on each.
    assert 2 * share - whole == 5 * 4 * 64
    rows = [
        groups.bytes_of_one(config, batch_size=8, mesh=m) - parameters
        for m, parameters in ((None, whole), (mesh, share))
    ]
    assert rows[1] == 2 * (16 * 2048 + 20 * 64)
    assert rows[0] == 8 * (16 * 4096 + 20 * 64)


def test_the_places_of_a_state():
    """Whatever has d_sae entries is split, the rest is whole; d_sae = d_model, so that
    shapes alone do not tell."""
    from mesh_cases import arm

    device = jax.devices()[0]
    one = jax.sharding.Mesh(np.array([device]).reshape(1, 1), mesh.AXES)
    state = arm(d_sae=16, variance="learned").state
    places = layout.shardings(state, one)
    split = jax.tree_util.tree_leaves_with_path(places)
    names = [
        str(path[-1]).strip("[].'\"") for path, place in split if tuple(place.spec)
    ]
    trained = ["w_enc", "b_enc", "w_dec_t", "w_var", "b_var"]
    # Parameters and both of Adam's moments.
    assert sorted(names) == sorted([*3 * trained, "rows_since_fired"])
