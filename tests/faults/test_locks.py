"""A second process on the same folder is refused at once; a dead one's lock is not."""

import os
import signal
import subprocess
import sys
import time

import pytest
from tiny_runs import LENGTH, TRAINING, call, copied

from faults.places import ROOT, one_error
from vsae_jax import runs
from vsae_jax.system import locks
from vsae_jax.system.errors import UserError

HOLD = """
import sys, time, pathlib
from vsae_jax.system import locks
with locks.held(pathlib.Path(sys.argv[1]), doing="train"):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """A process that holds the lock of `run`."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
    )
    assert process.stdout.readline() == b"held\n"
    yield process
    process.kill()
    process.communicate()


def test_another_process_is_refused_by_name_until_it_is_killed(
    holder, tiny_rows, tiny_model, tiny_corpus, tmp_path, capfd
):
    out = tmp_path / "run"
    train = {"activations": tiny_rows, "out": out, **TRAINING}
    extract = {"model": tiny_model, "backend": "jax", "dataset": tiny_corpus}
    extract |= {"num_tokens": 9 * LENGTH, "context_length": LENGTH, "out": out}
    for name, flags in (("train", train), ("extract", extract)):
        began = time.monotonic()
        assert call(name, **flags) == 2
        line = one_error(capfd.readouterr().err)
        assert f"{out} is being written by train, process {holder.pid} on" in line
        assert time.monotonic() - began < 5
        assert [path.name for path in out.iterdir()] == [locks.LOCK]
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert (out / locks.LOCK).is_file()
    assert call("train", **train) == 0
    said = capfd.readouterr().out
    assert f"process {holder.pid} on" in said and "is gone; going on" in said
    assert not (out / locks.LOCK).exists() and (out / runs.PARAMETERS).is_file()


def test_each_arm_of_a_grid_has_a_lock_of_its_own(
    tiny_grid, tiny_rows, tmp_path, capfd
):
    out = copied(tiny_grid, tmp_path / "grid")
    arm = out / "variant-vsae_topk_beta-0.0"
    (arm / runs.PARAMETERS).unlink()
    flags = {"activations": tiny_rows, **TRAINING, "variant": "topk,vsae_topk"}
    flags |= {"beta": "0,2", "out": out}
    with locks.held(arm, doing="train"):
        assert call("train", **flags) == 2
    assert f"{arm} is being written by train, pro" in one_error(capfd.readouterr().err)
    assert call("train", **flags) == 0
    assert (arm / runs.PARAMETERS).is_file()


def test_a_folder_is_left_as_it_was(tmp_path):
    with locks.held(tmp_path / "a" / "b", doing="x"):
        assert (tmp_path / "a" / "b" / locks.LOCK).is_file()
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "kept").mkdir()
    with locks.held(tmp_path / "kept", doing="x"):
        (tmp_path / "kept" / "file").write_text("")
    assert [path.name for path in (tmp_path / "kept").iterdir()] == ["file"]


def test_a_hostile_lock_file_is_one_short_line(tmp_path, capsys):
    (tmp_path / locks.LOCK).write_bytes(b"\x1b[2J\n" * 10_000 + b"\xff")
    with locks.held(tmp_path, doing="x"):
        said = capsys.readouterr().out
        with pytest.raises(UserError) as refused:
            with locks.held(tmp_path, doing="y"):
                pass
    assert "\x1b" not in said and said.count("\n") == 1 and len(said) < 500
    assert "is being written by x, process" in str(refused.value)


def test_without_locks_a_note_says_so(tmp_path, monkeypatch, capsys):
    def none(descriptor, how):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(locks.fcntl, "flock", none)
    with locks.held(tmp_path, doing="x"):
        assert "file system without locks" in capsys.readouterr().out


def test_a_lock_that_was_removed_meanwhile_is_taken_anew(tmp_path, monkeypatch):
    """Between opening and locking the file, its holder removed it and ended."""
    flock, calls = locks.fcntl.flock, []

    def late(descriptor, how):
        if not calls:
            (tmp_path / locks.LOCK).unlink()
        calls.append(descriptor)
        flock(descriptor, how)

    monkeypatch.setattr(locks.fcntl, "flock", late)
    with locks.held(tmp_path, doing="x"):
        assert len(calls) == 2
        monkeypatch.setattr(locks.fcntl, "flock", flock)
        with pytest.raises(UserError, match="is being written by x"):
            with locks.held(tmp_path, doing="y"):
                pass
