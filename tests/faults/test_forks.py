"""A changed config is refused with the difference; `--fork_from` starts a new run."""

import numpy as np
import pytest
from safetensors.numpy import load_file
from tiny_runs import TRAINING, call, copied

from faults.places import contents, one_error
from vsae_jax import runs
from vsae_jax.training.checkpoint import Checkpoints


@pytest.fixture
def flags(tiny_rows) -> dict[str, object]:
    return {"activations": tiny_rows, "variant": "topk", "log_every": 1, **TRAINING}


def test_a_changed_config_names_the_difference_and_the_way(tiny_run, flags, capfd):
    assert call("train", out=tiny_run, **flags | {"lr": 0.5}) == 2
    line = one_error(capfd.readouterr().err)
    assert "lr: " in line and "-> 0.5" in line and f"--fork_from={tiny_run}" in line


@pytest.mark.slow
def test_the_same_settings_go_on_as_one_longer_run(flags, tmp_path):
    """With schedules that do not depend on --steps a fork is what a longer run does."""
    flags |= {"lr_warmup_steps": 0, "lr_decay_start": 900, "dead_after_tokens": 9999}
    assert call("train", out=tmp_path / "a", **flags) == 0
    more = flags | {"steps": 40}
    before = contents(tmp_path / "a")
    fork = {"out": tmp_path / "b", "fork_from": tmp_path / "a"}
    assert call("train", **more, **fork) == 0
    assert contents(tmp_path / "a") == before
    assert call("train", out=tmp_path / "whole", **more) == 0
    one, other = (load_file(tmp_path / x / runs.PARAMETERS) for x in ("b", "whole"))
    for name, array in one.items():
        np.testing.assert_array_equal(array, other[name])
    steps = [x["step"] for x in runs.read_metrics(tmp_path / "b" / runs.METRICS)]
    assert steps == list(range(21, 41))
    stored = runs.read_json(tmp_path / "b" / runs.CONFIG)
    assert stored["data"]["forked_from"] == str(tmp_path / "a")


@pytest.mark.slow
def test_a_fork_that_was_killed_goes_on_without_its_source(
    tiny_run, flags, tmp_path, monkeypatch, capsys
):
    source = copied(tiny_run, tmp_path / "source")
    flags |= {"steps": 40, "out": tmp_path / "fork", "fork_from": source}
    flags |= {"beta": 3, "penalty": "kl"}
    save = Checkpoints.save

    def killed(self, state, **options):
        save(self, state, **options)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", killed)
        assert call("train", **flags) == 130
    source.rename(tmp_path / "elsewhere")
    capsys.readouterr()
    assert call("train", **flags) == 0
    assert "going on from step 20" in capsys.readouterr().out
    flags |= {"out": tmp_path / "again", "fork_from": tmp_path / "elsewhere"}
    assert call("train", **flags) == 0
    both = [tmp_path / x / runs.PARAMETERS for x in ("fork", "again")]
    assert both[0].read_bytes() == both[1].read_bytes()


@pytest.mark.slow
def test_a_grid_from_one_run_and_from_a_grid(tiny_run, flags, tmp_path):
    grid = flags | {"lr": "1e-4,1e-3", "steps": 30}
    out = tmp_path / "grid"
    assert call("train", out=out, fork_from=tiny_run, **grid) == 0
    single = flags | {"lr": 1e-3, "steps": 30}
    assert call("train", out=tmp_path / "one", fork_from=tiny_run, **single) == 0
    both = [f / runs.PARAMETERS for f in (out / "lr-0.001", tmp_path / "one")]
    assert both[0].read_bytes() == both[1].read_bytes()
    more = grid | {"steps": 35}
    assert call("train", out=tmp_path / "more", fork_from=out, **more) == 0
    stored = runs.read_json(tmp_path / "more" / "lr-0.001" / runs.CONFIG)
    assert stored["train"]["steps"] == 35


def test_a_fork_has_the_scale_that_its_own_config_asks_for(tiny_run, flags, tmp_path):
    asked = flags | {"steps": 21, "fork_from": tiny_run, "input_scale": 7}
    assert call("train", out=tmp_path / "fork", **asked) == 0
    one, other = (load_file(f / runs.PARAMETERS) for f in (tmp_path / "fork", tiny_run))
    assert one["scale"] == pytest.approx(other["scale"] * 7 / 100)


def test_a_fork_goes_on_with_the_running_threshold(flags, tmp_path):
    """Of batch_topk; with no decay it stays what it was."""
    flags |= {"variant": "batch_topk"}
    assert call("train", out=tmp_path / "first", **flags) == 0
    more = flags | {"steps": 21, "fork_from": tmp_path / "first"}
    more |= {"threshold_decay": 0.999999}
    assert call("train", out=tmp_path / "fork", **more) == 0
    first, fork = (load_file(tmp_path / f / runs.PARAMETERS) for f in ("first", "fork"))
    assert first["threshold"] > 0
    assert fork["threshold"] == pytest.approx(first["threshold"], rel=1e-4)


@pytest.mark.parametrize(
    "changed, said",
    [
        ({"d_sae": 64}, "arrays of other shapes (d_sae: 32 -> 64)"),
        ({"variance": "learned", "variant": "vsae_topk"}, "variance: 'fixed'"),
        ({"steps": 20}, "--steps=20 must be above the 20 steps"),
        ({"fork_from": "nowhere"}, "--fork_from=nowhere is not a run"),
    ],
)
def test_what_cannot_be_forked(tiny_run, flags, tmp_path, capfd, changed, said):
    asked = flags | {"steps": 40, "fork_from": tiny_run, "out": tmp_path / "new"}
    capfd.readouterr()
    assert call("train", **asked | changed) == 2
    assert said in one_error(capfd.readouterr().err)
