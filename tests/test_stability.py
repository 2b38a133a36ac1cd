"""Whether latents come back with another seed: of runs whose answer is known."""

import json

import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment
from tiny_runs import CONTEXTS, D_MODEL, D_SAE, LENGTH, call, write_run

import vsae_jax
from vsae_jax import runs
from vsae_jax.lm import load_language_model

FIELDS = {"variant": "topk", "k": 4}


def arrays(rng):
    w_dec = rng.standard_normal((D_SAE, D_MODEL))
    w_dec /= np.linalg.norm(w_dec, axis=1, keepdims=True)
    return {"w_enc": w_dec.T, "w_dec": w_dec}


def axes(rotated):
    """Arrays with a latent for each axis and its opposite, the first three of the axes
    turned within their space: no new one is within 0.7 of an old one."""
    eye = np.eye(D_MODEL)
    if rotated:
        eye[:3, :3] -= 2 / 3
    w_dec = np.concatenate([eye, -eye])
    return {"w_enc": w_dec.T, "w_dec": w_dec}


def permuted(given, order):
    return {"w_enc": given["w_enc"][:, order], "w_dec": given["w_dec"][order]}


@pytest.fixture(scope="module")
def found(tiny_rows, tmp_path_factory):
    """Stability by run: one is the other with its latents in another order, two have
    nothing to do with each other, two share some latents and the subspace of the
    others, and one has no partner."""
    folder, rng = tmp_path_factory.mktemp("stability"), np.random.default_rng(0)
    one = arrays(rng)
    each = {
        "same-0": (one, {"seed": 0}),
        "same-1": (permuted(one, rng.permutation(D_SAE)), {"seed": 1}),
        "other-0": (arrays(rng), {"seed": 0, "lr": 0.1}),
        "other-1": (arrays(rng), {"seed": 1, "lr": 0.1}),
        "axes-0": (axes(rotated=False), {"seed": 0, "variant": "relu"}),
        "axes-1": (axes(rotated=True), {"seed": 1, "variant": "relu"}),
        "alone": (one, {"seed": 0, "lr": 0.2}),
        # The same config but for the rows, so no partner of alone either.
        "other-rows": (one, {"seed": 1, "lr": 0.2, "max_norm_multiple": 1.1}),
    }
    for name, (given, fields) in each.items():
        write_run(folder / name, tiny_rows, given, **{**FIELDS, **fields})
    runs.write_json(folder / runs.GRID, {"arms": list(each), "swept": ["seed", "lr"]})
    # SAEBench has no such evaluation, so nothing is written in its schema.
    assert call("evaluate", run=folder, evals="stability", saebench_json=True) == 0
    path = "evals/stability.json"
    results = {name: json.loads((folder / name / path).read_text()) for name in each}
    return {name: one | {"folder": folder / name} for name, one in results.items()}


def test_latents_in_another_order_return(found):
    for name in ("same-0", "same-1"):
        metrics = found[name]["metrics"]
        assert metrics["latents_that_return"] == metrics["alive"] > D_SAE / 2
        assert metrics["both_above_0.7"] == metrics["activation_in_returning"] == 1
        assert metrics["same_partner_both_above_0.7"] == 1
        assert metrics["latents_that_return_by_correlation"] == metrics["alive"]
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
    for name in ("alone", "other-rows"):
        assert found[name]["pairs"] == [] and found[name]["metrics"] == {}


def matched(values):
    return values[linear_sum_assignment(values, maximize=True)]


def unit(rows):
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_numbers_are_those_of_a_plain_computation(found, tiny_rows, tiny_model):
    """Each of other-0's metrics of old, by its definition."""
    activations = vsae_jax.open_activations(tiny_rows)
    special = load_language_model(str(tiny_model), backend="jax").special_ids
    counts = ~np.isin(activations.tokens(64, CONTEXTS)[:, 1:], sorted(special))
    rows = activations.rows(64 * (LENGTH - 1), CONTEXTS * (LENGTH - 1))[counts.ravel()]
    loaded = [vsae_jax.load(found[name]["folder"]) for name in ("other-0", "other-1")]
    f_a, f_b = (np.asarray(one.encode(rows), np.float64) for one in loaded)
    alive_a, alive_b = ((f != 0).sum(axis=0) >= 20 for f in (f_a, f_b))
    a, b = (unit(np.asarray(one.w_dec, float)) for one in loaded)
    cosine = a[alive_a] @ b[alive_b].T
    i, j = linear_sum_assignment(cosine, maximize=True)
    size, returns = np.abs(f_a).sum(axis=0)[alive_a], cosine[i, j] > 0.7
    within = a[alive_a] @ a[alive_a].T - 2 * np.eye(alive_a.sum())
    correlation = np.corrcoef(f_a.T[alive_a], f_b.T[alive_b])
    correlation = correlation[: alive_a.sum(), alive_a.sum() :]
    shifted = np.roll(f_b, len(rows) // 2, axis=0).T[alive_b]
    by_chance = np.corrcoef(f_a.T[alive_a], shifted)[: alive_a.sum(), alive_a.sum() :]
    expected = {
        "alive": alive_a.sum(),
        "latents_that_return": returns.sum(),
        "both_above_0.7": returns.mean(),  # w_enc is w_dec here
        "activation_in_returning": size[i][returns].sum() / size.sum(),
        "decoder_cosine_median": np.median(cosine[i, j]),
        "decoder_cosine_above_0.7": returns.mean(),
        "correlation_median": np.median(matched(correlation)),
        "correlation_above_0.7": (matched(correlation) > 0.7).mean(),
        "correlation_by_chance_median": np.median(matched(by_chance)),
        "nearest_within_run_median": np.median(within.max(axis=1)),
        "nearest_in_other_run_above_0.7": (cosine.max(axis=1) > 0.7).mean(),
    }
    metrics = found["other-0"]["metrics"]
    got = {name: metrics[name] for name in expected}
    assert got == pytest.approx(expected, abs=1e-5)
    assert found["other-0"]["config"]["rows"] == len(rows)
    mine = np.full(D_SAE, np.nan)
    mine[np.flatnonzero(alive_a)[i]] = cosine[i, j]
    each = np.array(found["other-0"]["per_latent"]["decoder_cosine"], float)
    assert each == pytest.approx(mine, abs=1e-3, nan_ok=True)
    rate = found["other-0"]["per_latent"]["firing_rate"]
    assert rate == pytest.approx((f_a != 0).mean(axis=0), abs=1e-3)


def test_both_runs_of_a_pair_read_the_same_matching(found):
    one, other = found["other-0"]["metrics"], found["other-1"]["metrics"]
    for name in ("decoder_cosine_median", "correlation_median", "latents_that_return"):
        assert one[name] == other[name]
    assert one["decoder_cosine_by_chance_median"] > 0


def test_latents_that_do_not_return_fill_the_same_subspace(found):
    metrics = found["axes-0"]["metrics"]
    assert 0 < metrics["latents_that_return"] <= metrics["alive"] - 3
    assert metrics["not_returning_in_their_subspace"] == pytest.approx(1)
    assert metrics["not_returning_in_their_subspace_by_chance"] == 3 / D_MODEL
    # Where all return there is nothing to ask this of.
    assert found["same-0"]["metrics"]["not_returning_in_their_subspace"] is None


def test_one_run_is_refused(tiny_run, capsys):
    assert call("evaluate", run=tiny_run, evals="stability") == 2
    assert "differ in nothing but seeds" in capsys.readouterr().err
