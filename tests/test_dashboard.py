"""The page's data and the command; how the page behaves is in test_page.py."""

import base64
import dataclasses
import gzip
import hashlib
import json
import re

import numpy as np
import pytest
from planted import write_planted
from tiny_runs import (
    D_MODEL,
    D_SAE,
    TRAINING,
    call,
    copied,
    identity_arrays,
    write_run,
)

from vsae_jax import dashboard, runs
from vsae_jax.config import TrainConfig
from vsae_jax.latents.matching import by_chance, compare, describe, match
from vsae_jax.training.plan import first_state, open_folder, plan
from vsae_jax.training.step import variables


@pytest.fixture(scope="module")
def planted(tmp_path_factory, tiny_rows):
    return write_planted(tmp_path_factory.mktemp("planted") / "p", tiny_rows)


def unpack(page):
    """The page's blocks by id."""
    found = re.findall(
        r'<script type="application/gzip" id="([\w-]+)">([^<]*)</script>', page
    )
    return {n: json.loads(gzip.decompress(base64.b64decode(d))) for n, d in found}


@pytest.fixture(scope="module")
def page(planted):
    """Its text, after one run of the command that had to make features/ first."""
    assert call("dashboard", run=planted) == 0
    return (planted / "dashboard.html").read_text()


def test_the_page_asks_for_nothing(page):
    for word in ("fetch(", "@import", "XMLHttpRequest", "innerHTML", "eval(", " src="):
        assert word not in page, word
    links = re.findall(r'(?:href|url)\s*[=(]\s*"?([^")\s>]+)', page)
    assert all(link.startswith("data:") for link in links), links


def test_the_page_may_run_its_own_script_alone(page):
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', page)[1]
    assert "default-src 'none'" in policy and "unsafe" not in policy
    script = re.search(r"<script>(.*?)</script>", page, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy


def test_the_page_says_what_features_say(page, planted):
    blocks = unpack(page)
    side = blocks["overview"]["sides"][0]
    with np.load(planted / "features" / "features.npz") as arrays:
        np.testing.assert_array_equal(side["columns"]["fired"], arrays["n_fired"])
        np.testing.assert_allclose(
            side["columns"]["rate"], arrays["firing_rate"], rtol=1e-4
        )
        assert side["full"] == list(range(32)) and len(blocks) == 3
        alive = int(np.argmax(arrays["n_fired"]))
        one = blocks[f"features-a-{alive // 16}"][alive % 16]
        assert sum(one["histogram"]["counts"]) == one["fired"]
        assert len(one["groups"]) == 10
        first = one["top"][0]
        assert first["ids"][first["peak"]] % D_MODEL == alive
        peak = side["columns"]["peak"]
        assert all(p % D_MODEL == i for i, p in enumerate(peak[:D_MODEL]) if p >= 0)
        assert peak[D_MODEL:] == [-1] * D_MODEL
    assert side["map"]["title"] == "Decoder rows, PCA"
    # Every token that may be shown has its text.
    shown = {i for seq in one["top"] for i in seq["ids"]}
    assert {str(i) for i in shown} <= side["texts"].keys()


def test_equal_runs_give_equal_pages(planted, page, tmp_path):
    assert call("dashboard", run=planted, out=tmp_path / "again.html") == 0
    assert (tmp_path / "again.html").read_text() == page


def test_curves_and_numbers_of_a_trained_run_are_there(tiny_run, tmp_path):
    run = copied(tiny_run, tmp_path / "run")
    assert call("evaluate", run=run) == 0
    assert call("dashboard", run=run, features=4) == 0
    side = unpack((run / "dashboard.html").read_text())["overview"]["sides"][0]
    assert side["training"]["step"][-1] == 20 and "loss" in side["training"]
    metrics = json.loads((run / "evals" / "core.json").read_text())["metrics"]
    assert side["metrics"]["ce_loss_score"] == metrics["ce_loss_score"]
    assert len(side["full"]) == 4 and side["settings"]["k"] == 4


def test_a_map_and_a_maximiser_are_shown_where_they_are(planted, tmp_path):
    run = copied(planted, tmp_path / "run")
    (run / "maps").mkdir()
    maps = {"embedding": np.eye(3, 2), "latents": [2, 0, 5], "cluster": [1, 0, 1]}
    np.savez(run / "maps" / "maps.npz", **maps)
    (run / "maximised").mkdir()
    made = {"tokens": ["a", "</script>"], "activations": [0.5, 2.0]}
    stored = {"latent": 2, "synthetic": made, "real": made}
    runs.write_json(run / "maximised" / "2.json", stored)
    assert call("dashboard", run=run) == 0
    blocks = unpack((run / "dashboard.html").read_text())
    shown = blocks["overview"]["sides"][0]["map"]
    assert shown["latents"] == [2, 0, 5] and shown["cluster"] == [1, 0, 1]
    assert blocks["features-a-0"][2]["maximised"]["synthetic"] == made
    assert blocks["features-a-0"][3]["maximised"] is None


@pytest.mark.parametrize(
    ("asked", "expected"), [("3,1,3", [1, 3]), ("7,", [7]), ("99", list(range(32)))]
)
def test_features_are_a_number_or_a_list(planted, page, asked, expected):
    side = dashboard.ready(planted, dashboard.DashboardConfig(run=str(planted)))
    assert dashboard.choose(side, asked) == expected


def test_some_features_are_spread_over_the_rates(planted, page):
    side = dashboard.ready(planted, dashboard.DashboardConfig(run=str(planted)))
    chosen = dashboard.choose(side, "4")
    fired = side.arrays["n_fired"]
    assert len(chosen) == 4 and (fired[chosen] > 0).all()
    alive = fired[fired > 0]
    assert {alive.min(), alive.max()} <= set(fired[chosen])


def test_features_of_other_parameters_are_made_again(planted, page, tmp_path, capsys):
    run = copied(planted, tmp_path / "run")
    arrays = identity_arrays()
    arrays["w_enc"] = arrays["w_enc"][:, ::-1]
    rows = planted.parent / "rows"
    other = write_run(tmp_path / "other", rows, arrays, variant="relu")
    (other / "features").symlink_to(run / "features")
    assert call("dashboard", run=run) == 0
    assert "looking at" not in capsys.readouterr().out
    assert call("dashboard", run=run, num_tokens=64) == 0
    assert "features/ was made with --num_tokens=" in capsys.readouterr().out
    assert call("dashboard", run=other) == 0
    assert "features/ is of other parameters" in capsys.readouterr().out


def test_matching_is_the_best_sum_and_not_the_nearest_row():
    # Both of a lie nearest to the first of b; greedily the second pair costs 0.9.
    a = np.array([[1, 0.1], [1, 0.0], [0, 0]])
    b = np.array([[1, 0.05], [0.6, 0.8], [-1, 0]])
    alive = np.array([True, True, False])
    partner, cosine = match(a, b, alive_a=alive, alive_b=alive)
    assert partner.tolist() == [1, 0, -1]
    unit = a / np.maximum(np.linalg.norm(a, axis=1, keepdims=True), 1)
    expected = [unit[0] @ b[1], 1 / np.hypot(1, 0.05), 0]
    np.testing.assert_allclose(cosine, expected, atol=1e-2)


def test_matching_finds_a_permutation(planted, page, tmp_path):
    order = np.random.default_rng(0).permutation(32)
    arrays = {"w_enc": identity_arrays()["w_enc"][:, order]}
    arrays["w_dec"] = identity_arrays()["w_dec"][order]
    rows = planted.parent / "rows"
    other = write_run(tmp_path / "other", rows, arrays, variant="relu")
    out = tmp_path / "both.html"
    assert call("dashboard", run=planted, compare=other, features=5, out=out) == 0
    blocks = unpack(out.read_text())
    a, b = blocks["overview"]["sides"]
    partner = np.array(a["columns"]["partner"])
    alive = np.array(a["columns"]["fired"]) > 0
    np.testing.assert_array_equal(order[partner[alive]], np.flatnonzero(alive))
    assert (partner[~alive] == -1).all()
    assert np.array(a["columns"]["cosine"])[alive] == pytest.approx(1)
    # Five of each side, spread over its rates, and the match of each of them.
    assert (
        sorted(partner[a["full"]].tolist()) == b["full"] and 5 <= len(a["full"]) <= 10
    )
    assert len(blocks["features-b-0"]) == len(b["full"])
    low, high = np.flatnonzero(alive)[[2, 5]].tolist()
    asked = {"features": f"{high},{low}", "out": out}
    assert call("dashboard", run=planted, compare=other, **asked) == 0
    a, b = unpack(out.read_text())["overview"]["sides"]
    assert a["full"] == [low, high]
    assert b["full"] == sorted(partner[[low, high]].tolist())


def untrained(run, variant, seed, folder):
    """A run as it starts: its weights are those before the first step."""
    config = TrainConfig(
        activations=str(run), out=str(folder), variant=variant, seed=seed, **TRAINING
    )
    job = plan(config)
    assert open_folder(job)
    state = first_state(job, None)
    runs.write_parameters(folder / runs.PARAMETERS, variables(state, job.sae))
    return runs.open_run(folder)


def test_a_shared_start_is_said_and_chance_stands_beside_it(tiny_rows, tmp_path):
    """At the first step two variants of one seed agree wholly, two seeds not at all:
    what a reader must not take for features found twice."""
    kinds = {"a": ("topk", 0), "b": ("vsae_topk", 0), "c": ("topk", 1)}
    a, b, c = (untrained(tiny_rows, *k, tmp_path / n) for n, k in kinds.items())
    alive = np.ones(D_SAE, bool)
    same = compare(a, b, alive_a=alive, alive_b=alive)
    assert same.shared_start and same.of_pairs == pytest.approx(1)
    said = " ".join(describe(same))
    assert "Both started from the same weights (seed 0)" in said
    assert "100.0 % of the pairs have the same number" in said
    assert "compare runs of different seeds" in said
    other = compare(a, c, alive_a=alive, alive_b=alive)
    said = " ".join(describe(other))
    assert other.shared_start is False
    assert "They started from different weights (seeds 0 and 1)" in said
    assert "compare runs of different seeds" not in said
    for matched in (same, other):
        assert len(matched.chance) == D_SAE and matched.chance.max() < 0.9
        level = np.median(matched.chance)
        assert f"By chance: median {level:.3f}" in " ".join(describe(matched))


def test_chance_is_that_of_the_dimensions_which_the_rows_fill():
    """Rows in 2 of 16 dimensions are near to one another whatever they mean."""
    rng = np.random.default_rng(0)
    flat = np.zeros((2, 300, 16))
    flat[:, :, :2] = rng.standard_normal((2, 300, 2))
    wide = rng.standard_normal((2, 300, 16))
    alive = np.ones(300, bool)
    for a, b in (flat, wide):
        # Rows without a meaning: their own pairs are what chance gives.
        level = np.median(match(a, b, alive_a=alive, alive_b=alive)[1])
        assert np.median(by_chance(a, b)) == pytest.approx(level, abs=0.02)
    assert np.median(by_chance(*flat)) > 0.99 > 0.8 > np.median(by_chance(*wide))


def test_what_was_not_trained_here_has_no_known_start(tiny_rows, tmp_path):
    run = untrained(tiny_rows, "topk", 0, tmp_path / "a")
    alive = np.arange(D_SAE) < 3
    imported = dataclasses.replace(run, train=None)
    matched = compare(run, imported, alive_a=alive, alive_b=alive)
    assert matched.shared_start is None and len(matched.of_pairs) == 3
    assert "How they started is not known" in " ".join(describe(matched))
    none = compare(run, imported, alive_a=alive, alive_b=np.zeros(D_SAE, bool))
    assert describe(none) == ["No pair: in one of the two no latent fires."]


def test_compare_says_the_start_on_the_page_and_in_the_terminal(
    planted, page, tmp_path, capsys
):
    other = write_run(
        tmp_path / "other", planted.parent / "rows", identity_arrays(), variant="relu"
    )
    out = tmp_path / "both.html"
    assert call("dashboard", run=planted, compare=other, out=out) == 0
    printed = capsys.readouterr().out
    found = unpack(out.read_text())["overview"]["matching"]
    assert all(line in printed for line in found["said"])
    assert "the same weights (seed 0)" in printed and "By chance: median" in printed
    alive = np.array(unpack(page)["overview"]["sides"][0]["columns"]["fired"]) > 0
    assert len(found["chance"]) == alive.sum()


def test_latents_outside_features_keep_their_strongest_texts(planted, page, tmp_path):
    out = tmp_path / "few.html"
    assert call("dashboard", run=planted, features="3,9", out=out) == 0
    blocks = unpack(out.read_text())
    rest = [i for i in range(32) if i not in (3, 9)]
    briefs = blocks["briefs-a-0"]
    assert len(briefs) == len(rest) and "briefs-a-1" not in blocks
    whole = unpack(page)
    for latent, texts in zip(rest, briefs, strict=True):
        full = whole[f"features-a-{latent // 16}"][latent % 16]["top"]
        assert [t["context"] for t in texts] == [t["context"] for t in full[:5]]
        for text, longer in zip(texts, full, strict=False):
            peak, value = text["peak"], longer["values"][longer["peak"]]
            assert text["values"][peak] == value and len(text["ids"]) <= 17
    shown = {str(i) for texts in briefs for t in texts for i in t["ids"]}
    assert shown <= blocks["overview"]["sides"][0]["texts"].keys()
    assert not any(name.startswith("briefs") for name in whole)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({}, "--run is not set"),
        ({"run": "nowhere"}, "nowhere is not a folder"),
        ({"run": "x", "features": "some"}, "--features=some must be a number"),
        ({"run": "x", "features": "-1"}, "--features=-1 must be a number"),
        ({"run": "x", "features": ","}, "--features=, must be a number"),
        ({"run": "x", "num_tokens": 0}, "--num_tokens=0 must be at least 1"),
    ],
)
def test_bad_input_is_one_line(flags, said, capsys):
    assert call("dashboard", **flags) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_what_is_wrong_in_a_run_is_one_line(planted, page, tiny_grid, tmp_path, capsys):
    def refused(said, **flags):
        assert call("dashboard", **flags) == 2
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1, error

    names = ", ".join(folder.name for folder in runs.run_folders(tiny_grid))
    refused(f"is a grid; name one of the runs in it: {names}", run=tiny_grid)
    refused("--features=32 is no latent of", run=planted, features="1,32")
    run = copied(planted, tmp_path / "run")
    (run / "features" / "features.npz").write_bytes(b"PK\x03\x04 not really")
    refused("cannot be read", run=run)
    run = copied(planted, tmp_path / "run2")
    (run / "maps").mkdir()
    np.savez(run / "maps" / "maps.npz", embedding=np.eye(2))
    refused("lacks cluster, latents", run=run)
    maps = {"embedding": np.eye(2), "latents": [0, 99], "cluster": [0, 0]}
    np.savez(run / "maps" / "maps.npz", **maps)
    refused("is not of this run's 32 latents", run=run)
    run = copied(planted, tmp_path / "run3")
    (run / "maximised").mkdir()
    (run / "maximised" / "1.json").write_text('{"synthetic": {"tokens": ["a"]}}')
    refused("has no tokens and activations under 'synthetic'", run=run)
