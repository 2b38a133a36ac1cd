"""Whether latents come back with another seed: of runs whose answer is known."""

import json

import numpy as np
import pytest
from tiny_runs import D_MODEL, D_SAE, call, write_run

from vsae_jax import runs

FIELDS = {"variant": "topk", "k": 4}


def arrays(rng):
    w_dec = rng.standard_normal((D_SAE, D_MODEL))
    w_dec /= np.linalg.norm(w_dec, axis=1, keepdims=True)
    return {"w_enc": w_dec.T, "w_dec": w_dec}


def permuted(given, order):
    return {"w_enc": given["w_enc"][:, order], "w_dec": given["w_dec"][order]}


@pytest.fixture(scope="module")
def found(tiny_rows, tmp_path_factory):
    """Stability by run: one is the other with its latents in another order, two have
    nothing to do with each other, and a fifth has no partner."""
    folder, rng = tmp_path_factory.mktemp("stability"), np.random.default_rng(0)
    one = arrays(rng)
    each = {
        "same-0": (one, {"seed": 0}),
        "same-1": (permuted(one, rng.permutation(D_SAE)), {"seed": 1}),
        "other-0": (arrays(rng), {"seed": 0, "lr": 0.1}),
        "other-1": (arrays(rng), {"seed": 1, "lr": 0.1}),
        "alone": (one, {"seed": 0, "lr": 0.2}),
    }
    for name, (given, fields) in each.items():
        write_run(folder / name, tiny_rows, given, **FIELDS, **fields)
    runs.write_json(folder / runs.GRID, {"arms": list(each), "swept": ["seed", "lr"]})
    assert call("evaluate", run=folder, evals="stability") == 0
    path = "evals/stability.json"
    return {name: json.loads((folder / name / path).read_text()) for name in each}


def test_latents_in_another_order_return(found):
    for name in ("same-0", "same-1"):
        metrics = found[name]["metrics"]
        assert metrics["latents_that_return"] == metrics["alive"] > D_SAE / 2
        assert metrics["both_above_0.7"] == metrics["activation_in_returning"] == 1
        for median in ("decoder_cosine_median", "correlation_median"):
            assert metrics[median] == pytest.approx(1, abs=1e-4)
        assert metrics["correlation_by_chance_median"] < 0.7
        assert metrics["nearest_within_run_median"] < 0.9


def test_what_has_nothing_in_common_is_at_chance(found):
    metrics = found["other-0"]["metrics"]
    chance = metrics["decoder_cosine_by_chance_median"]
    assert metrics["decoder_cosine_median"] == pytest.approx(chance, abs=0.1)
    assert metrics["both_above_0.7"] < 0.5


def test_pairs_are_named_and_a_run_alone_has_none(found):
    assert [pair["with"] for pair in found["same-0"]["pairs"]] == ["same-1"]
    assert found["alone"]["pairs"] == [] and found["alone"]["metrics"] == {}


def test_one_run_is_refused(tiny_run, capsys):
    assert call("evaluate", run=tiny_run, evals="stability") == 2
    assert "differ in nothing but seeds" in capsys.readouterr().err
