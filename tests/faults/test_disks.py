"""A disk that fills up under a shard, a checkpoint, a line of metrics, the parameters:
one line, what was written is intact, and with room the same command goes on."""

import resource
import shutil
import subprocess

import pytest
from tiny_runs import LENGTH, call

from faults.places import contents, fill, one_error, small_disk  # noqa: F401  a fixture
from vsae_jax import runs
from vsae_jax.activations.manifest import read_manifest
from vsae_jax.activations.shards import ShardWriter
from vsae_jax.training import loggers
from vsae_jax.training.checkpoint import Checkpoints


@pytest.fixture
def extraction(tiny_model, tiny_corpus) -> dict[str, object]:
    flags = {"model": tiny_model, "backend": "jax", "dataset": tiny_corpus}
    return flags | {"num_tokens": 64 * LENGTH, "context_length": LENGTH}


def more_room(disk) -> None:
    subprocess.run(["mount", "-o", "remount,size=30m", str(disk)], check=True)


def test_a_shard(extraction, small_disk, tmp_path, monkeypatch, capfd):  # noqa: F811
    flags = extraction | {"shard_contexts": 16, "dtype": "float32"}
    assert call("extract", out=tmp_path / "whole", **flags) == 0
    plenty = shutil.disk_usage(small_disk)._replace(free=2**40)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: plenty)
    commit, out = ShardWriter.commit, small_disk / "rows"

    def commit_then_fill(self):
        commit(self)
        fill(small_disk, leave=8192)

    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "commit", commit_then_fill)
        capfd.readouterr()
        assert call("extract", out=out, **flags) == 2
    line = one_error(capfd.readouterr().err)
    assert "No space left on device" in line and "1 shards are safe" in line
    left, whole = contents(out), contents(tmp_path / "whole")
    assert len(read_manifest(out).shards) == 1
    left.pop("manifest.json")
    assert left == {name: whole[name] for name in whole if "00000" in name}
    more_room(small_disk)
    assert call("extract", out=out, **flags) == 0
    assert contents(out) == whole


@pytest.fixture
def training(tiny_rows) -> dict[str, object]:
    flags = {"activations": tiny_rows, "d_sae": 256, "k": 4, "batch_size": 32}
    return flags | {"steps": 20, "checkpoint_every": 5, "log_every": 1}


def after_step(step: int, disk, monkeypatch, *, of, name: str, leave: int) -> None:
    """The disk fills up just before `of.name` is called for the `step`-th time."""
    original, calls = getattr(of, name), []

    def filling(self, *arguments, **options):
        calls.append(1)
        if len(calls) == step:
            fill(disk, leave=leave)
            if of is loggers.JsonLines:  # longer than what is left of a block
                arguments = (arguments[0], {"loss": 1.0, "x" * 5000: 1.0})
        return original(self, *arguments, **options)

    monkeypatch.setattr(of, name, filling)


@pytest.mark.parametrize(
    "of, name, step, leave, named",
    [
        (Checkpoints, "save", 3, 20_000, "the checkpoint of step 15"),
        (loggers.JsonLines, "write", 13, 0, "metrics.jsonl"),
    ],
)
def test_a_run(
    training,
    small_disk,  # noqa: F811
    tmp_path,
    monkeypatch,
    capfd,
    of,
    name,
    step,
    leave,
    named,
):
    assert call("train", out=tmp_path / "whole", **training) == 0
    out = small_disk / "run"
    with monkeypatch.context() as patch:
        after_step(step, small_disk, patch, of=of, name=name, leave=leave)
        capfd.readouterr()
        assert call("train", out=out, **training) == 2
    line = one_error(capfd.readouterr().err)
    assert "No space left on device" in line and named in line and "make room" in line
    with Checkpoints(out / runs.CHECKPOINTS, read_only=True) as checkpoints:
        assert checkpoints.steps() == [5, 10]
    more_room(small_disk)
    assert call("train", out=out, **training) == 0
    assert "going on from step 10" in capfd.readouterr().out
    assert parameters(out) == parameters(tmp_path / "whole")
    names = {path.name for path in out.iterdir()}
    assert names == {path.name for path in (tmp_path / "whole").iterdir()}


def parameters(folder) -> bytes:
    return (folder / runs.PARAMETERS).read_bytes()


@pytest.mark.slow
def test_the_parameters(training, small_disk, tmp_path, monkeypatch, capfd):  # noqa: F811
    assert call("train", out=tmp_path / "whole", **training) == 0
    out, write = small_disk / "run", runs.write_parameters

    def full(path, variables):
        fill(small_disk, leave=0)
        write(path, variables)

    with monkeypatch.context() as patch:
        patch.setattr(runs, "write_parameters", full)
        capfd.readouterr()
        assert call("train", out=out, **training) == 2
    line = one_error(capfd.readouterr().err)
    assert "No space left on device" in line and "sae.safetensors" in line
    assert not list(out.glob("*.tmp")) and not (out / runs.PARAMETERS).exists()
    more_room(small_disk)
    assert call("train", out=out, **training) == 0
    assert parameters(out) == parameters(tmp_path / "whole")


def test_a_line_that_does_not_fit_is_not_written_later(tmp_path):
    log = loggers.JsonLines(tmp_path / "metrics.jsonl")
    log.write(1, {"loss": 1.0})

    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    full = (tmp_path / "metrics.jsonl").stat().st_size
    resource.setrlimit(resource.RLIMIT_FSIZE, (full, unlimited[1]))
    try:
        with pytest.raises(OSError, match=r"File too large.*metrics.jsonl"):
            log.write(2, {"loss": 1.0})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    log.close()
    assert [x["step"] for x in runs.read_metrics(tmp_path / "metrics.jsonl")] == [1]
