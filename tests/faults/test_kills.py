"""`kill -9` at random moments: the result has the bits of an undisturbed run.

One folder is killed again and again until it is finished, and compared; then the next
folder, until the kills are used up. Most kills come at a random moment after the work
has begun, checkpoint writes included; every fourth at any moment since the start.
"""

import json
import os
import random
import signal
import threading
import time
from pathlib import Path

import pytest
from tiny_models import make_stories, write_jsonl
from tiny_runs import LENGTH, call

from faults.places import contents, lines_until, start
from vsae_jax import runs
from vsae_jax.system.files import TEMPORARY
from vsae_jax.system.locks import LOCK

KILLS = int(os.environ.get("FAULTS_KILLS", "50"))
SEED = int(os.environ.get("FAULTS_SEED", "0"))
# Seconds from a start to the first line of the plan, at most, on a loaded machine.
_START_S = 12.0


def killed(name: str, rng: random.Random, *, work_s: float, **flags: object) -> int:
    """The exit status of a command that is killed at a random moment, or that ends
    before it."""
    there = names(flags["out"])
    process = start(name, **flags)
    if rng.random() < 0.25:
        delay = rng.uniform(0, _START_S)
    else:
        if name == "train":
            for _ in lines_until(process, "compiled in"):
                pass
        else:  # the first new file
            while process.poll() is None and names(flags["out"]) == there:
                time.sleep(0.002)
        delay = rng.uniform(0, work_s)
    timer = threading.Timer(delay, process.kill)
    timer.start()
    _, errors = process.communicate(timeout=300)
    timer.cancel()
    assert process.returncode in (0, -signal.SIGKILL), errors
    assert "Traceback" not in errors, errors
    return process.returncode


def until_used_up(name: str, *, folder: Path, work_s: float, check, **flags) -> dict:
    """Kills the command `KILLS` times, folder after folder; `check(folder)` each one
    that is finished. What happened, in numbers."""
    rng, seen = random.Random(SEED), {"kills": 0, "finished": 0, "half written": 0}
    while seen["kills"] < KILLS:
        out = folder / f"{name}-{seen['finished']}"
        while killed(name, rng, work_s=work_s, out=out, **flags):
            seen["kills"] += 1
            seen["half written"] += half_written(out)
            if seen["kills"] == KILLS:
                break
        if seen["kills"] == KILLS:
            assert call(name, out=out, **flags) == 0
        seen["finished"] += 1
        check(out)
    return seen


def half_written(folder: Path) -> bool:
    """Whether a shard, a checkpoint or a small file was being written."""
    return any(
        TEMPORARY in name or "orbax-checkpoint-tmp" in name for name in names(folder)
    )


def names(folder: Path) -> set[str]:
    """Of all files below, but for the lock."""
    found = folder.rglob("*") if folder.is_dir() else ()
    return {path.name for path in found} - {LOCK}


def report(name: str, seen: dict, began: float) -> None:
    seen = seen | {"seconds": round(time.monotonic() - began)}
    print(f"\n{name}: {json.dumps(seen)}")


@pytest.mark.slow
def test_extract(tiny_model, tmp_path):
    corpus = write_jsonl(tmp_path / "stories.jsonl", make_stories(2000))
    flags = {"model": tiny_model, "backend": "jax", "dataset": corpus}
    flags |= {"num_tokens": 1200 * LENGTH, "context_length": LENGTH}
    flags |= {"shard_contexts": 32, "batch_size": 4}
    assert call("extract", out=tmp_path / "whole", **flags) == 0
    whole, began = contents(tmp_path / "whole"), time.monotonic()
    assert len(whole) == 77

    def check(folder: Path) -> None:
        found = contents(folder)
        # Left by a kill after the last shard: a finished folder is not locked again.
        found.pop(LOCK, None)
        assert found.keys() == whole.keys()
        assert found == whole

    seen = until_used_up("extract", folder=tmp_path, work_s=5.0, check=check, **flags)
    report("extract", seen, began)
    assert seen["kills"] == KILLS


@pytest.mark.slow
@pytest.mark.parametrize("grid", [False, True])
def test_train(tiny_rows, tmp_path, grid):
    flags = {"activations": tiny_rows, "d_sae": 64, "k": 4, "batch_size": 32}
    flags |= {"steps": 600, "checkpoint_every": 20, "log_every": 5}
    flags |= {"variant": "topk,vsae_topk", "steps": 300} if grid else {}
    assert call("train", out=tmp_path / "whole", **flags) == 0
    began = time.monotonic()

    def check(folder: Path) -> None:
        for arm in runs.run_folders(tmp_path / "whole"):
            name = arm.relative_to(tmp_path / "whole")
            assert_same(folder / name, arm)

    seen = until_used_up("train", folder=tmp_path, work_s=8.0, check=check, **flags)
    report("train, a grid" if grid else "train", seen, began)
    assert seen["kills"] == KILLS


def assert_same(one: Path, other: Path) -> None:
    """Parameters bit for bit, metrics line for line but for the rate."""
    both = [(folder / runs.PARAMETERS).read_bytes() for folder in (one, other)]
    assert both[0] == both[1]
    lines = [metrics(folder) for folder in (one, other)]
    assert lines[0] == lines[1] and len(lines[0]) > 1
    top = {path.name for path in one.iterdir()}
    assert top == {path.name for path in other.iterdir()}


def metrics(folder: Path) -> list[dict]:
    lines = runs.read_metrics(folder / runs.METRICS)
    return [line | {"rows_per_second": None} for line in lines]
