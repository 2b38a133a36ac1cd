"""The command as a user runs it: files, resuming, kills, signals, refusals."""

import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file
from tiny_models import make_stories, make_tiny_neox, write_jsonl
from tiny_runs import call

from vsae_jax import extract, runs, train
from vsae_jax.activations.shards import Activations
from vsae_jax.config import ExtractConfig, TrainConfig
from vsae_jax.system.errors import Interrupted, UserError
from vsae_jax.training import loop, plan
from vsae_jax.training.batches import Feed


@pytest.fixture(scope="module")
def activations(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("activations")
    make_tiny_neox(folder / "model")
    write_jsonl(folder / "stories.jsonl", make_stories(400))
    extract.run(
        ExtractConfig(
            model=str(folder / "model"),
            backend="jax",
            dataset=str(folder / "stories.jsonl"),
            num_tokens=16_000,
            context_length=16,
            shard_contexts=300,
            layer=1,
            out=str(folder / "rows"),
        )
    )
    return folder / "rows"


def settings(activations: Path, out: Path) -> TrainConfig:
    return TrainConfig(
        activations=str(activations),
        out=str(out),
        k=4,
        d_sae=64,
        steps=60,
        batch_size=32,
        checkpoint_every=20,
        log_every=15,
        steps_per_dispatch=4,
    )


@pytest.fixture
def config(activations, tmp_path) -> TrainConfig:
    return settings(activations, tmp_path / "run")


def parameters(folder: str | Path) -> dict[str, np.ndarray]:
    return load_file(Path(folder) / runs.PARAMETERS)


def metrics(folder: str | Path) -> list[dict]:
    lines = (Path(folder) / runs.METRICS).read_text().splitlines()
    return [json.loads(line) for line in lines]


def assert_same_run(a: str | Path, b: str | Path) -> None:
    first, second = parameters(a), parameters(b)
    assert first.keys() == second.keys()
    for name, array in first.items():
        np.testing.assert_array_equal(array, second[name], err_msg=name)
    for x, y in zip(metrics(a), metrics(b), strict=True):
        x.pop("rows_per_second"), y.pop("rows_per_second")
        assert x == y


@pytest.fixture(scope="module")
def undisturbed(activations, tmp_path_factory) -> Path:
    """The run of `config`, done in one go."""
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    return train.run(settings(activations, out))


def test_run_folder(undisturbed, activations):
    assert {p.name for p in undisturbed.iterdir()} == {
        "config.json",
        "metrics.jsonl",
        "checkpoints",
        "sae.safetensors",
    }
    stored = json.loads((undisturbed / "config.json").read_text())
    assert stored["data"]["manifest"] == Activations.open(activations).manifest.hash
    assert stored["train"]["beta"] == 0.1 and stored["train"]["lr"] > 0
    unset = {name for name, value in stored["train"].items() if value is None}
    assert unset == {"max_norm_multiple"}
    shapes = {name: a.shape for name, a in parameters(undisturbed).items()}
    assert shapes == {
        "w_enc": (16, 64),
        "b_enc": (64,),
        "w_dec": (64, 16),
        "b_dec": (16,),
        "scale": (),
        "mean": (16,),
    }
    run = runs.open_run(undisturbed)
    norms = np.linalg.norm(run.variables["params"]["w_dec"], axis=1)
    np.testing.assert_allclose(norms, np.ones(64), rtol=1e-5)


def test_metrics_lines(undisturbed):
    lines = metrics(undisturbed)
    assert [line["step"] for line in lines] == [15, 30, 45, 60]
    assert all(line["l0"] == 4 for line in lines)
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert lines[0]["beta"] == pytest.approx(0.1) and lines[0]["kl"] > 0
    assert {"explained_variance", "dead_fraction", "rows_per_second"} <= lines[0].keys()


def test_a_finished_run_says_so(undisturbed, config, capsys):
    before = parameters(undisturbed)
    train.run(replace(config, out=str(undisturbed)))
    assert "is finished; nothing to do" in capsys.readouterr().out
    np.testing.assert_array_equal(before["w_enc"], parameters(undisturbed)["w_enc"])


def test_dispatch_size_and_intervals_do_not_change_the_result(undisturbed, config):
    train.run(replace(config, steps_per_dispatch=7, checkpoint_every=13))
    assert_same_run(undisturbed, config.out)


class SignalAfter:
    """Stands in for a signal that comes after some looks at it."""

    def __init__(self, looks: int):
        self._looks = looks

    @property
    def signal(self) -> int:
        self._looks -= 1
        return signal.SIGTERM if self._looks < 0 else 0


@pytest.mark.parametrize("looks", [0, 7, 15])
def test_stopped_and_resumed_is_bit_for_bit(looks, undisturbed, config, monkeypatch):
    with monkeypatch.context() as patch:
        stopping = contextlib.nullcontext(SignalAfter(looks))
        patch.setattr(loop.signals, "caught", lambda: stopping)
        with pytest.raises(Interrupted, match="is saved in") as stop:
            train.run(config)
    assert stop.value.exit_status == 128 + signal.SIGTERM
    assert not (Path(config.out) / runs.PARAMETERS).exists()
    train.run(config)
    assert_same_run(undisturbed, config.out)


def command_line(config: TrainConfig) -> list[str]:
    names = (
        "activations out k d_sae steps batch_size checkpoint_every log_every "
        "steps_per_dispatch"
    ).split()
    flags = [f"--{name}={getattr(config, name)}" for name in names]
    return [sys.executable, "-m", "vsae_jax.train", *flags]


def wait_for(path: Path, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.02)


def long_settings(activations: Path, out: Path) -> TrainConfig:
    config = settings(activations, out)
    return replace(config, steps=1500, checkpoint_every=100, log_every=50)


@pytest.fixture(scope="module")
def long_undisturbed(activations, tmp_path_factory) -> Path:
    return train.run(
        long_settings(activations, tmp_path_factory.mktemp("long") / "run")
    )


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_real_kill_then_the_same_command(
    number, activations, long_undisturbed, tmp_path, capsys
):
    long = long_settings(activations, tmp_path / "killed")
    process = subprocess.Popen(
        command_line(long), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    wait_for(tmp_path / "killed" / "checkpoints" / "100", process)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    if number == signal.SIGKILL:
        assert process.returncode == -number
    else:
        assert process.returncode == 128 + number
        assert "run the same command to go on" in errors
    assert "Traceback" not in errors
    assert call("train", *command_line(long)[3:]) == 0
    assert "going on from step" in capsys.readouterr().out
    assert_same_run(tmp_path / "killed", long_undisturbed)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 400 kB that can be made larger."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount).returncode:
        pytest.skip("a small file system may not be mounted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_one_line_and_the_run_goes_on(small_disk, config):
    full = replace(config, out=str(small_disk / "run"), d_sae=512, steps=60)
    argv = [*command_line(full)[2:], "--checkpoint_every=5"]
    done = subprocess.run(
        [sys.executable, "-m", *argv], capture_output=True, text=True, check=False
    )
    lines = [line for line in done.stderr.splitlines() if not line[:1].isdigit()]
    assert done.returncode == 2
    assert len(lines) == 1 and "No space left on device" in lines[0], done.stderr
    subprocess.run(["mount", "-o", "remount,size=30m", str(small_disk)], check=True)
    train.run(replace(full, checkpoint_every=5))
    train.run(replace(full, out=str(small_disk / "whole")))
    assert_same_run(full.out, small_disk / "whole")


def test_another_config_in_the_same_folder_is_refused(undisturbed, config):
    with pytest.raises(UserError, match=r"another config \(lr: .* -> 0.5\)"):
        train.run(replace(config, out=str(undisturbed), lr=0.5))


def test_held_out_rows_are_never_read(config, activations, monkeypatch):
    seen = []
    read = Activations.view

    def view(self, start, stop):
        seen.append(stop)
        return read(self, start, stop)

    monkeypatch.setattr(Activations, "view", view)
    train.run(replace(config, held_out=0.25, steps=200, batch_size=64))
    opened = Activations.open(activations)
    held_out = -(-opened.n_contexts // 4)
    limit = (opened.n_contexts - held_out) * opened.rows_per_context
    assert max(seen) == limit < opened.n_rows


def test_nan_rows_stop_the_run_and_name_the_step(config, monkeypatch):
    real = Feed.stack

    def broken(self, position, count, *, n_max):
        rows = real(self, position, count, n_max=n_max)
        place = 28 - position // config.batch_size
        return rows.at[place].set(np.nan) if 0 <= place < count else rows

    monkeypatch.setattr(Feed, "stack", broken)
    with pytest.raises(UserError, match="not finite at step 28; step 20 is saved"):
        train.run(config)
    with loop.Checkpoints(Path(config.out) / runs.CHECKPOINTS) as checkpoints:
        assert checkpoints.steps() == [20]


@pytest.mark.parametrize(
    ("asked", "norm"), [("unit", 1.0), ("sqrt_d", 4.0), (25.0, 25.0)]
)
@pytest.mark.parametrize("center", [False, True])
def test_input_scale_is_the_root_mean_square_row_norm(config, asked, norm, center):
    planned = plan.plan(replace(config, input_scale=asked, center_input=center))
    norms = jax.device_get(plan.first_state(planned, None).norm)
    opened = planned.activations
    x = np.asarray(opened.rows(0, opened.n_rows), np.float64)
    x_n = norms["scale"] * (x - norms["mean"])
    assert np.sqrt(np.mean(np.sum(x_n**2, axis=1))) == pytest.approx(norm, rel=1e-4)
    if center:
        np.testing.assert_allclose(x_n.mean(axis=0), np.zeros(16), atol=1e-3 * norm)


def test_b_dec_starts_at_the_geometric_median(config):
    planned = plan.plan(config)
    with Feed(planned) as feed:
        sample = feed.first(500)
    state = plan.first_state(planned, plan.first_b_dec(planned, sample))
    x_n = np.asarray(state.norm["scale"]) * np.asarray(sample)
    distance = np.linalg.norm(x_n - np.asarray(state.params["b_dec"]), axis=1).sum()
    from_mean = np.linalg.norm(x_n - x_n.mean(axis=0), axis=1).sum()
    assert distance < from_mean


def test_rows_on_the_device_are_the_same_stream(config, tmp_path):
    runs_ = [
        train.run(replace(config, feed=feed, out=str(tmp_path / feed)))
        for feed in ("device", "stream")
    ]
    device, stream = [(folder / runs.PARAMETERS).read_bytes() for folder in runs_]
    assert device == stream


def test_a_run_that_saved_nothing_takes_another_config(config, capsys):
    folder = plan.plan(config).folder
    assert plan.open_folder(plan.plan(config))
    train.run(replace(config, lr=0.01))
    assert "nothing was saved under another config (" in capsys.readouterr().out
    assert runs.open_run(folder).train.lr == 0.01


def test_notes_on_flags_without_effect(config, capsys):
    train.run(
        replace(config, variant="topk", beta=0.5, dead_after_tokens=10**6, steps=2)
    )
    said = capsys.readouterr().out
    assert "--beta=0.5 changes nothing: penalty is none" in said
    assert "--dead_after_tokens=1000000 is not reached in a run of 64 rows" in said


def test_a_place_of_noise_without_noise_is_noted(config, capsys):
    train.run(replace(config, variant="topk", noise_at="input", steps=2))
    assert "--noise_at=input changes nothing" in capsys.readouterr().out


@pytest.mark.parametrize("flag", ["tensorboard", "wandb"])
def test_a_missing_logger_is_found_before_anything_is_done(config, monkeypatch, flag):
    find = importlib.util.find_spec
    absent = {"tensorboardX", "wandb"}
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *more: None if name in absent else find(name, *more),
    )
    with pytest.raises(UserError, match="is not installed; install it with"):
        train.run(replace(config, **{flag: True}))
    assert not Path(config.out).exists()


def test_penalty_flag_makes_topk_with_l2(config):
    train.run(replace(config, variant="topk", penalty="kl", beta=0.5, steps=4))
    assert runs.open_run(config.out).sae.penalty == "kl"


def test_tensorboard(config):
    pytest.importorskip("tensorboardX", reason="needs the tensorboard extra")
    train.run(replace(config, tensorboard=True))
    events = list((Path(config.out) / "tensorboard").iterdir())
    assert events and events[0].stat().st_size > 200


@pytest.mark.skipif(os.environ.get("WANDB_MODE") == "online", reason="would upload")
def test_wandb_offline(config, monkeypatch):
    pytest.importorskip("wandb", reason="needs the wandb extra")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    train.run(replace(config, wandb=True, steps=20))
    assert list((Path(config.out) / "wandb").glob("offline-run-*/*.wandb"))


@pytest.mark.parametrize(
    "variant, relu, keeps",
    [
        ("vsae_topk", None, True),
        ("vsae_topk", True, False),
        ("vsae", None, True),
        ("topk", None, False),
        ("jump_relu", None, False),
    ],
)
def test_a_run_that_keeps_negative_latents_says_so(
    activations, tmp_path, variant, relu, keeps, capsys
):
    config = replace(settings(activations, tmp_path), variant=variant, relu=relu)
    plan.explain(plan.plan(config))
    said = "note: it keeps negative latents" in capsys.readouterr().out
    assert said == keeps
