"""Too little memory is said before the start, with the flag that helps."""

from dataclasses import replace

import pytest
from tiny_runs import TRAINING, call

from faults.places import one_error
from vsae_jax import runs
from vsae_jax.config import TrainConfig
from vsae_jax.training import memory, plan


@pytest.fixture
def flags(tiny_rows, tmp_path) -> dict[str, object]:
    return {"activations": tiny_rows, "out": tmp_path / "run", **TRAINING}


def test_few_steps_at_once_need_few_rows(flags):
    """However many are asked for: rows of many steps take memory."""
    asked = {"steps_per_dispatch": 2**30, "steps": 2**30, "log_every": 2**30}
    named = TrainConfig(**{n: str(v) for n, v in flags.items() if n[0] in "ao"})
    config = replace(named, **{**TRAINING, **asked}, checkpoint_every=2**30)
    assert 100 < plan.steps_at_once([plan.plan(config)]) < 10**6
    large = replace(config, d_sae=2**16, batch_size=2**14)
    assert plan.steps_at_once([plan.plan(large)]) == 1


@pytest.mark.parametrize(
    "large, first",
    [
        ({"d_sae": 2**20}, "parameters, moments and gradients"),
        ({"batch_size": 2**24}, "latents of a batch"),
        ({"batch_size": 2**23, "d_sae": 4}, "rows"),
    ],
)
def test_what_does_not_fit(flags, capfd, tmp_path, monkeypatch, large, first):
    monkeypatch.setattr(memory, "free_bytes", lambda: 10**9)
    assert call("train", **flags | large) == 2
    line = one_error(capfd.readouterr().err)
    assert "will not fit" in line and "1.0 GB are free" in line
    named = line.split("of what is large: ")[1]
    assert named.startswith(first)
    assert "(--d_sae)" in named and "--batch_size" in named and "--steps_per" in named
    assert not (tmp_path / "run" / runs.METRICS).exists()


def test_the_plan_is_printed(flags, capfd):
    assert call("train", **flags) == 0
    assert "memory  about " in capfd.readouterr().out


def test_the_foreseen_is_near_what_a_step_takes(flags, capfd):
    """Compared with XLA's own account of the compiled step, at a shape of some MB."""
    flags |= {"d_sae": 4096, "batch_size": 256, "steps": 2, "kernels": "xla"}
    assert call("train", **flags) == 0
    said = capfd.readouterr().out
    foreseen = 5 * 4 * 2 * 16 * 4096 + 16 * 256 * 4096
    compiled = said.split("memory: states ")[1]
    states, work = (
        float(compiled.split(" GB")[0]),
        float(compiled.split("a step ")[1].split(" GB")[0]),
    )
    assert foreseen / 4 < (states + work) * 1e9 < foreseen * 2
