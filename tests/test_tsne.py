"""The map's numbers against hand-made cases, and the command."""

import json
import sys

import numpy as np
import pytest
from tiny_arms import make_arms, write_features
from tiny_runs import D_MODEL, D_SAE, call, copied, write_run

from vsae_jax import tsne
from vsae_jax.activations.shards import Activations
from vsae_jax.autoencoder import sae
from vsae_jax.interop.loading import open_any
from vsae_jax.latents import map_statistics


def two_groups(n: int, *, wide: float) -> np.ndarray:
    """n directions, the first half near one axis, the second near another."""
    rows = np.random.default_rng(0).standard_normal((n, D_MODEL)) * wide
    rows[: n // 2, 0] += 1
    rows[n // 2 :, 1] += 1
    return rows


def test_nearest_cosines_and_pairs_equal_the_plain_matrix():
    rows = np.random.default_rng(1).standard_normal((600, 5))
    nearest, counts = map_statistics.cosines(rows)
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    cosine = np.clip(unit @ unit.T, -1, 1)
    pairs = cosine[np.triu_indices(600, 1)]
    expected = np.histogram(pairs, map_statistics.COSINE_EDGES)[0]
    np.testing.assert_array_equal(counts, expected)
    np.fill_diagonal(cosine, -2)
    np.testing.assert_allclose(nearest, cosine.max(1), atol=1e-12)


def test_identical_rows_have_nearest_cosine_1():
    nearest, counts = map_statistics.cosines(np.tile([[3.0, 4.0]], (4, 1)))
    np.testing.assert_allclose(nearest, 1)
    assert counts[-1] == counts.sum() == 6


def test_a_zero_row_is_near_to_nothing():
    nearest, _ = map_statistics.cosines(np.array([[0.0, 0], [1, 0], [1, 0]]))
    np.testing.assert_allclose(nearest, [0, 1, 1])


def test_random_directions_are_nearer_the_more_there_are():
    few, many, wide = (
        map_statistics.random_nearest_cosine(n, d, seed=0)
        for n, d in ((10, 16), (1000, 16), (1000, 256))
    )
    assert few < many and wide < many
    assert map_statistics.random_nearest_cosine(2000, 2, seed=0) > 0.999


def test_uniform_firing_is_as_effective_as_there_are_latents():
    counts = map_statistics.alive_counts(np.full(50, 0.02), np.ones(50))
    assert counts["entropy_effective_latents"] == pytest.approx(50)
    assert counts["effective_share_of_alive"] == pytest.approx(1)


def test_alive_counts_by_hand():
    rate = np.array([0, 1e-5, 1e-4, 2e-4, 0.05, 0.5])
    most = np.array([0, 0.1, 2.5, 2.6, 30.0, -4.0])
    counts = map_statistics.alive_counts(rate, most)
    alive = [counts[f"n_alive_above_{t}"] for t in ("0", "0.0001", "0.01", "0.1")]
    assert alive == [5, 3, 2, 1]
    assert counts["n_max_in_paper_range"] == 2


def test_clusters_that_differ_in_rate_and_clusters_that_do_not():
    labels = np.repeat([0, 1], [30, 10])
    numbers = map_statistics.cluster_numbers(labels, 1.0 * (labels == 0), seed=0)
    assert numbers["cluster_rate_cv"] == 1
    assert numbers["cluster_rate_cv_shuffled"] < 0.2
    assert (numbers["cluster_size_min"], numbers["cluster_size_max"]) == (10, 30)
    assert numbers["cluster_size_cv"] == 0.5
    even = map_statistics.cluster_numbers(labels, np.full(40, 0.3), seed=0)
    assert even["cluster_rate_cv"] == pytest.approx(0, abs=1e-12)


def test_the_spread_of_a_random_labelling_is_what_chance_gives():
    rng = np.random.default_rng(0)
    labels, rate = rng.integers(0, 10, 3000), rng.exponential(size=3000)
    numbers = map_statistics.cluster_numbers(labels, rate, seed=0)
    ratio = numbers["cluster_rate_cv"] / numbers["cluster_rate_cv_shuffled"]
    assert 0.5 < ratio < 1.6


@pytest.fixture
def grouped(tiny_rows, tmp_path):
    """A run whose decoder rows form two tight groups of 16."""
    w_dec = two_groups(D_SAE, wide=0.002)
    run = tmp_path / "run"
    write_run(run, tiny_rows, {"w_enc": w_dec.T, "w_dec": w_dec}, variant="topk", k=4)
    write_features(run)
    return run


def test_two_tight_groups_are_found_and_said(grouped):
    flags = {"points": "decoder", "clusters": 2, "min_rate": 0}
    assert call("tsne", run=grouped, **flags) == 0
    metrics = json.loads((grouped / "maps" / "maps-decoder.json").read_text())[
        "metrics"
    ]
    assert metrics["silhouette_original"] > 0.97
    assert metrics["silhouette_2d"] > 0.5
    assert metrics["nn_cosine_mean"] > 0.999 > metrics["nn_cosine_random"]
    assert metrics["n_points"] == metrics["n_alive_above_0"] == D_SAE - 1
    with np.load(grouped / "maps" / "maps-decoder.npz") as stored:
        arrays = dict(stored)
    np.testing.assert_array_equal(arrays["latents"], np.arange(1, D_SAE))
    assert arrays["embedding"].shape == (D_SAE - 1, 2)
    first = arrays["cluster"][arrays["latents"] < D_SAE // 2]
    rest = arrays["cluster"][arrays["latents"] >= D_SAE // 2]
    assert len(set(first)) == len(set(rest)) == 1 and first[0] != rest[0]
    np.testing.assert_allclose(arrays["firing_rate"], np.linspace(0, 0.5, D_SAE)[1:])


def test_rarer_latents_are_left_out(grouped):
    assert call("tsne", run=grouped, points="decoder", clusters=2, min_rate=0.25) == 0
    with np.load(grouped / "maps" / "maps-decoder.npz") as stored:
        assert stored["latents"].min() == D_SAE // 2


def test_samples_are_latents_of_held_out_text(grouped):
    config = tsne.MapConfig(run=str(grouped), samples=50)
    run = open_any(grouped)
    latents = np.array([1, 5, 9])
    f = tsne.sampled_latents(run, latents, config)
    rows = Activations.open(run.train.activations)
    start, stop = run.data["held_out_contexts"]
    x = rows.rows(start * 15, stop * 15)[rows.tokens(start, stop)[:, 1:].ravel() != 0]
    some = np.linspace(0, len(x) - 1, 50).astype(int)
    expected = np.asarray(sae.encode(run.variables, x, config=run.sae))[:, latents]
    assert f.shape == (50, 3)
    np.testing.assert_allclose(f, expected[some], atol=1e-5)


def test_activations_are_standardised_and_constant_ones_left_out(grouped):
    config = tsne.MapConfig(run=str(grouped), samples=100)
    latents, points = tsne.as_points(open_any(grouped), np.arange(D_SAE), config)
    assert len(latents) == len(points) and 4 <= len(latents) <= D_SAE
    np.testing.assert_allclose(points.mean(1), 0, atol=1e-5)
    np.testing.assert_allclose(points.std(1), 1, atol=1e-5)


def test_a_grid_has_one_row_a_series_with_the_spread_over_seeds(
    tiny_rows, tmp_path, capfd
):
    arms = make_arms(tmp_path, tiny_rows)
    for arm in arms:
        rate = np.full(D_SAE, 0.1 * (1 + arm.settings["seed"]))
        rate[: arm.settings["seed"]] = 0
        write_features(arm.folder, firing_rate=rate)
    assert call("tsne", run=tmp_path, points="decoder", clusters=3) == 0
    lines = (tmp_path / "maps-decoder.md").read_text().splitlines()
    assert len(lines) > 2 + 4 and lines[6] == ""
    legend = " ".join(lines[7:])
    assert all(f"{name}:" in legend for name in ("points", "by chance", "silhouette"))
    assert lines[2].startswith(
        "| topk, k 2 | 2 | 31.5 ± 0.7 | 31.5 ± 0.7 | 31.5 ± 0.7 |"
    )
    assert "\n".join(lines) in capfd.readouterr().out


@pytest.mark.parametrize(
    "flags, said",
    [
        ({"min_rate": 0.49}, "too few for 10 clusters; lower --min_rate"),
        ({"min_rate": 1}, "--min_rate=1.0 must be below 1"),
        ({"clusters": 1}, "--clusters=1 must be at least 2"),
        ({"points": "encoder"}, "--points=encoder"),
        ({"run": ""}, "--run is not set"),
    ],
)
def test_mistakes_are_one_line(grouped, flags, said, capfd):
    assert call("tsne", **{"run": grouped} | flags) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert said in line


def test_without_features_it_names_the_command(tiny_run, tmp_path, capfd):
    run = copied(tiny_run, tmp_path / "run")
    assert call("tsne", run=run) == 2
    assert f"python -m vsae_jax.features --run={run}" in capfd.readouterr().err


def test_features_of_another_autoencoder_are_refused(grouped, capfd):
    write_features(grouped, firing_rate=np.full(D_SAE + 1, 0.1))
    assert call("tsne", run=grouped) == 2
    assert "of another autoencoder" in capfd.readouterr().err


def test_without_scikit_learn_it_names_the_extra(grouped, monkeypatch, capfd):
    monkeypatch.setitem(sys.modules, "sklearn.cluster", None)
    assert call("tsne", run=grouped, points="decoder") == 2
    said = capfd.readouterr().err
    assert (
        "pip install scikit-learn (" in said and "pip install -e '.[analysis]'" in said
    )
