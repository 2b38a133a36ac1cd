"""SIGTERM and Ctrl-C: saved within ten seconds, an exit status that says so, and the
same bits when it goes on."""

import signal
import time

import pytest
from tiny_models import make_stories, write_jsonl
from tiny_runs import LENGTH, call

from faults.places import contents, lines_until, start
from vsae_jax import runs

NUMBERS = [signal.SIGTERM, signal.SIGINT]


def stopped(name: str, number: int, said: str, *, wait_s: float, **flags) -> float:
    """Seconds until a command that has said so much ended after the signal; `extract`
    is waited for until a shard is there."""
    process = start(name, **flags)
    for _ in lines_until(process, said):
        pass
    while name == "extract" and not any(flags["out"].glob("activations-*.npy")):
        assert process.poll() is None
        time.sleep(0.01)
    time.sleep(wait_s)
    began = time.monotonic()
    process.send_signal(number)
    _, errors = process.communicate(timeout=120)
    seconds = time.monotonic() - began
    assert process.returncode == 128 + number, errors
    assert "Traceback" not in errors
    assert "run the same command to go on" in errors.splitlines()[-1]
    return seconds


@pytest.mark.slow
@pytest.mark.parametrize("number", NUMBERS)
def test_train_of_long_steps(tiny_rows, tmp_path, number):
    """Steps of a good part of a second, a thousand of which a call may take."""
    flags = {"activations": tiny_rows, "d_sae": 4096, "k": 4, "batch_size": 1024}
    flags |= {"steps": 5000, "steps_per_dispatch": 1000, "out": tmp_path / "run"}
    flags |= {"log_every": 5000, "checkpoint_every": 5000}
    seconds = stopped("train", number, "compiled in", wait_s=3, **flags)
    print(f"\nsaved and ended {seconds:.1f} s after the signal")
    assert seconds < 10
    (checkpoint,) = (tmp_path / "run" / runs.CHECKPOINTS).iterdir()
    assert 0 < int(checkpoint.name) < 5000


@pytest.mark.slow
@pytest.mark.parametrize("number", NUMBERS)
def test_a_grid_goes_on_to_the_same_bits(tiny_rows, tmp_path, number):
    flags = {"activations": tiny_rows, "d_sae": 64, "k": 4, "batch_size": 32}
    flags |= {"steps": 1500, "variant": "topk,vsae_topk", "beta": "0,2"}
    out = tmp_path / "stopped"
    assert stopped("train", number, "compiled in", wait_s=1, out=out, **flags) < 10
    assert call("train", out=out, **flags) == 0
    assert call("train", out=tmp_path / "whole", **flags) == 0
    for arm in runs.run_folders(out):
        same = tmp_path / "whole" / arm.name / runs.PARAMETERS
        assert (arm / runs.PARAMETERS).read_bytes() == same.read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("number", NUMBERS)
def test_extract(tiny_model, tmp_path, number):
    corpus = write_jsonl(tmp_path / "stories.jsonl", make_stories(4000))
    flags = {"model": tiny_model, "backend": "jax", "dataset": corpus}
    flags |= {"num_tokens": 3000 * LENGTH, "context_length": LENGTH}
    flags |= {"shard_contexts": 4, "batch_size": 4}
    out = tmp_path / "stopped"
    assert stopped("extract", number, "writes", wait_s=1, out=out, **flags) < 10
    assert call("extract", out=out, **flags) == 0
    assert call("extract", out=tmp_path / "whole", **flags) == 0
    assert contents(out) == contents(tmp_path / "whole")
