"""Damaged and foreign files: found before they are trained on, and named."""

import contextlib
import dataclasses
import json
import re
import shutil
import signal
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny_models import make_stories, make_tiny_neox, write_jsonl
from tiny_runs import LENGTH, TRAINING, call, copied

from faults.places import one_error
from vsae_jax import runs
from vsae_jax.activations.manifest import MANIFEST, read_manifest
from vsae_jax.autoencoder import sae
from vsae_jax.config import SAEConfig
from vsae_jax.system import signals
from vsae_jax.system.errors import UserError
from vsae_jax.training import step
from vsae_jax.training.checkpoint import Checkpoints


def flip(path: Path) -> None:
    """One bit, in the middle."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def halve(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def swap(path: Path) -> None:
    """With the shard before it."""
    other = path.with_name(path.name.replace("00001", "00000"))
    ours, theirs = path.read_bytes(), other.read_bytes()
    path.write_bytes(theirs)
    other.write_bytes(ours)


DAMAGES = {
    flip: "is corrupt",
    truncate: "is truncated",
    Path.unlink: "is missing",
    swap: "is corrupt",
}


@pytest.fixture
def rows(tiny_rows, tmp_path) -> Path:
    return copied(tiny_rows, tmp_path / "rows")


def refused(capfd, name: str, **flags: object) -> str:
    capfd.readouterr()
    assert call(name, **flags) == 2
    return one_error(capfd.readouterr().err)


@pytest.mark.parametrize("verify", [False, True])
@pytest.mark.parametrize("damage", DAMAGES)
def test_rows_are_checked_at_first_use_or_all_before(
    rows, tmp_path, capfd, damage, verify
):
    damage(rows / "activations-00001.npy")
    flags = {"activations": rows, "out": tmp_path / "run", "verify": verify}
    line = refused(capfd, "train", **flags, **TRAINING)
    either = "0000[01]" if damage is swap else "00001"
    assert re.search(rf"activations-{either}.npy {DAMAGES[damage]}", line)
    assert not (tmp_path / "run" / runs.METRICS).exists()


@pytest.mark.parametrize("damage", DAMAGES)
def test_verify_reads_the_tokens_too(rows, tmp_path, capfd, damage):
    """Training reads no tokens: without --verify it does not see them."""
    damage(rows / "tokens-00001.npy")
    flags = {"activations": rows, "out": tmp_path / "run", **TRAINING}
    assert DAMAGES[damage] in refused(capfd, "train", verify=True, **flags)
    assert call("train", **flags) == 0


def test_tokens_of_another_run(rows, extracted, tmp_path, capfd):
    other = extracted(
        dataset=write_jsonl(tmp_path / "o.jsonl", make_stories(99, seed=3))
    )
    shutil.copy(other / "tokens-00000.npy", rows / "tokens-00000.npy")
    flags = {"activations": rows, "out": tmp_path / "run", "verify": True}
    line = refused(capfd, "train", **flags, **TRAINING)
    assert "tokens-00000.npy is corrupt" in line


@pytest.mark.parametrize("damage", [flip, truncate])
def test_extract_verifies_what_is_there(rows, tmp_path, capfd, damage):
    m = read_manifest(rows)
    names = (
        "model backend layer dataset num_tokens context_length dtype shard_contexts"
    ).split()
    flags = {name: getattr(m, name) for name in names} | {"out": rows}
    before = (rows / "activations-00001.npy").read_bytes()
    damage(rows / "activations-00001.npy")
    assert call("extract", **flags) == 0
    line = refused(capfd, "extract", verify=True, **flags)
    assert "activations-00001.npy" in line and "run extract again" in line
    (rows / "activations-00001.npy").unlink()
    assert call("extract", verify=True, **flags) == 0
    assert (rows / "activations-00001.npy").read_bytes() == before


@pytest.mark.parametrize(
    "old, new", [('"layer": 0', '"layer": 1'), ('"split": "train"', '"split": "dev"')]
)
def test_an_edited_manifest(rows, tmp_path, capfd, old, new):
    text = (rows / MANIFEST).read_text()
    assert old in text
    (rows / MANIFEST).write_text(text.replace(old, new))
    flags = {"activations": rows, "out": tmp_path / "run", **TRAINING}
    line = refused(capfd, "train", **flags)
    assert "it was edited" in line and MANIFEST in line


def test_a_manifest_of_before_it_had_a_checksum(rows, tmp_path):
    path = rows / MANIFEST
    values = json.loads(path.read_text())
    before = read_manifest(rows)
    del values["sha256"]
    path.write_text(json.dumps(values))
    assert read_manifest(rows) == before
    old = dataclasses.replace(before, weights_hash="")
    assert '"weights_hash"' not in old.to_bytes().decode()


def test_other_weights_under_the_same_config(tmp_path, capfd):
    model = make_tiny_neox(tmp_path / "model")
    corpus = write_jsonl(tmp_path / "stories.jsonl", make_stories(50))
    flags = {"model": model, "backend": "jax", "dataset": corpus}
    flags |= {"num_tokens": 40 * LENGTH, "context_length": LENGTH}
    flags |= {"shard_contexts": 20, "out": tmp_path / "rows"}
    assert call("extract", **flags) == 0
    (tmp_path / "rows" / "activations-00001.npy").unlink()
    make_tiny_neox(model, seed=1)
    line = refused(capfd, "extract", **flags)
    assert "made with other settings (weights_hash: " in line
    make_tiny_neox(model, seed=0)
    assert call("extract", **flags) == 0


@pytest.fixture
def stopped(tiny_rows, tmp_path, monkeypatch) -> dict[str, object]:
    """The flags of a run that was killed after its checkpoints of steps 5 and 10."""
    flags = {"activations": tiny_rows, "out": tmp_path / "run", "checkpoint_every": 5}
    flags |= TRAINING
    save = Checkpoints.save

    def killed(self, state, **options):
        if int(state.step) > 10:
            raise KeyboardInterrupt
        save(self, state, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", killed)
        assert call("train", **flags) == 130
    return flags


def largest_file(folder: Path) -> Path:
    return max(folder.rglob("*"), key=lambda path: path.stat().st_size)


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "damage",
    [flip, pytest.param(halve, marks=SLOW), pytest.param(Path.unlink, marks=SLOW)],
)
def test_a_damaged_checkpoint_gives_way_and_is_written_anew(
    stopped, tiny_rows, tmp_path, capfd, damage
):
    out = Path(stopped["out"])
    damage(largest_file(out / runs.CHECKPOINTS / "10" / "state"))
    capfd.readouterr()
    assert call("train", **stopped) == 0
    said = capfd.readouterr().out
    assert "checkpoint of step 10 is damaged" in said and "from step 5\n" in said
    whole = stopped | {"out": tmp_path / "whole"}
    assert call("train", **whole) == 0
    both = [(Path(o) / runs.PARAMETERS).read_bytes() for o in (out, whole["out"])]
    assert both[0] == both[1]


@pytest.mark.slow
def test_a_checkpoint_that_was_damaged_can_be_gone_on_from(
    stopped, tmp_path, monkeypatch, capfd
):
    """Once read past, the damaged one of step 10 is replaced by a good one."""
    out = Path(stopped["out"])
    halve(largest_file(out / runs.CHECKPOINTS / "10" / "state"))
    save = Checkpoints.save

    def killed(self, state, **options):
        save(self, state, **options)
        if int(state.step) == 10:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", killed)
        assert call("train", **stopped) == 130
    capfd.readouterr()
    assert call("train", **stopped) == 0
    said = capfd.readouterr().out
    assert "damaged" not in said and "going on from step 10" in said


def test_a_run_that_stops_below_a_damaged_checkpoint_is_saved(
    stopped, monkeypatch, capfd
):
    """Orbax writes no step below one that is there."""
    out = Path(stopped["out"])
    flip(largest_file(out / runs.CHECKPOINTS / "10" / "state"))
    seen = signals.Caught()
    seen.note(signal.SIGTERM, None)
    monkeypatch.setattr(signals, "caught", lambda: contextlib.nullcontext(seen))
    capfd.readouterr()
    flags = stopped | {"steps_per_dispatch": 2}
    assert call("train", **flags) == 128 + 15
    said = capfd.readouterr().err
    assert "step 6 is saved" in said
    monkeypatch.undo()
    assert call("train", **flags) == 0
    assert "going on from step 6\n" in capfd.readouterr().out


def test_a_half_written_checkpoint_is_cleared_away(stopped, capfd):
    folder = Path(stopped["out"]) / runs.CHECKPOINTS
    half = folder / "15.orbax-checkpoint-tmp"
    shutil.copytree(folder / "10", half)
    largest_file(half).unlink()
    assert call("train", **stopped) == 0
    assert "going on from step 10" in capfd.readouterr().out
    assert not half.exists()


def test_a_flipped_bit_of_any_array_is_found(tmp_path):
    """Orbax has no checksum of large arrays: 60 of 60 flips passed without ours."""
    config = SAEConfig(d_model=64, d_sae=256, k=3)
    variables = sae.init(jax.random.key(0), config)
    state = step.init_state(variables, jax.random.key(1), config)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state, data_position=0)
    path = largest_file(tmp_path / "0" / "state")
    good, like = path.read_bytes(), jax.eval_shape(lambda: state)
    rng = np.random.default_rng(0)
    for at in rng.integers(1000, len(good), 5):
        data = bytearray(good)
        data[at] ^= 1
        path.write_bytes(data)
        with Checkpoints(tmp_path) as checkpoints:
            with pytest.raises(UserError, match="no checkpoint of this run can be"):
                checkpoints.restore(like)
    path.write_bytes(good)
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.restore(like) is not None


@pytest.mark.parametrize(
    "line", [b"\x00\xff garbage\n", b'{"step": "5"}\n', b"[" * 9000 + b"\n", b"{}\n"]
)
def test_a_damaged_line_of_metrics_is_left_out(tmp_path, capfd, line):
    path = tmp_path / runs.METRICS
    path.write_bytes(line + b'{"step": 5, "loss": 1.0}\n{"step": 10, "lo')
    runs.keep_metrics_up_to(path, 20)
    assert f"1 lines of {path} are damaged" in capfd.readouterr().out
    assert path.read_bytes() == b'{"step": 5, "loss": 1.0}\n'
