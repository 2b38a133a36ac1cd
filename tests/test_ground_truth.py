"""Rows of known features, and measures of what was found of them."""

import dataclasses

import numpy as np
import pytest

from experiments import recovery, synthetic
from experiments.ground_truth import verdict
from experiments.paired import interval
from experiments.scales import Truth
from vsae_jax.activations.shards import Activations
from vsae_jax.system.errors import UserError

TRUTH = Truth(
    d_model=32,
    n_features=64,
    group=8,
    active=4,
    n_rows=1000,
    steps=1,
    batch_size=32,
    seeds=1,
)
MANY = 50_000


@pytest.fixture
def rng():
    return np.random.default_rng(1)


@pytest.fixture
def features():
    return synthetic.make_features(TRUTH, correlated=False)


@pytest.mark.parametrize("correlated", [False, True])
def test_as_many_features_fire_as_were_asked_for(correlated, rng):
    features = synthetic.make_features(TRUTH, correlated=correlated)
    fires = features.fires(MANY, rng)
    error = fires.sum(1).std() / MANY**0.5
    assert abs(fires.sum(1).mean() - TRUTH.active) < 4 * error
    sd = np.sqrt(features.rates * (1 - features.rates) / MANY)
    assert (np.abs(fires.mean(0) - features.rates) < 5 * sd).all()
    assert features.rates[0] > 2.5 * features.rates[-1]


def test_members_of_a_group_fire_together_and_others_alone(rng):
    features = synthetic.make_features(TRUTH, correlated=True)
    correlation = np.corrcoef(features.fires(MANY, rng).T.astype(float))
    group = np.arange(TRUTH.n_features) // TRUTH.group
    same = group[:, None] == group[None, :]
    # Of a pair that fires with a group of rate 2p: cov p/2 - p^2, variance p - p^2.
    expected = (0.5 - features.rates) / (1 - features.rates)
    wanted = np.where(same, expected[:, None], 0.0)
    np.fill_diagonal(wanted, 1.0)
    assert np.abs(correlation - wanted).max() < 0.06


def test_independent_features_do_not_correlate(features, rng):
    correlation = np.corrcoef(features.fires(MANY, rng).T.astype(float))
    np.fill_diagonal(correlation, 0.0)
    assert np.abs(correlation).max() < 6 / MANY**0.5


def test_a_code_is_the_least_amplitude_or_more_or_nothing(features, rng):
    codes = features.codes(MANY, rng)
    firing = codes[codes > 0]
    assert firing.min() >= 0.5 and codes.dtype == np.float32
    assert abs(firing.mean() - 1.5) < 0.02
    assert np.allclose(np.linalg.norm(features.directions, axis=1), 1)


@pytest.mark.parametrize("correlated", [False, True])
def test_rows_are_codes_times_directions(tmp_path, correlated, monkeypatch):
    monkeypatch.setattr(synthetic, "SHARD_CONTEXTS", 3)
    monkeypatch.setattr(synthetic, "PIECE_BYTES", 64 * 4 * 100)
    rows = synthetic.write(tmp_path / "rows", TRUTH, correlated=correlated)
    stored = Activations.open(rows)
    directions = np.load(rows / synthetic.FILE, allow_pickle=False)
    features = synthetic.make_features(TRUTH, correlated=correlated)
    assert np.array_equal(directions, features.directions)
    assert stored.n_rows == 1024 and len(stored.manifest.shards) == 3
    pieces = [
        codes
        for shard, contexts in enumerate([3, 3, 2])
        for codes in synthetic.shard_codes(features, contexts * 128, shard=shard)
    ]
    expected = np.concatenate(pieces) @ directions
    np.testing.assert_allclose(stored.rows(0, 1024), expected, atol=1e-5)
    some = expected[expected.any(1)]
    assert len(np.unique(some, axis=0)) == len(some) > 500


def test_a_folder_is_written_once_and_what_is_lost_again(tmp_path):
    rows = synthetic.write(tmp_path / "rows", TRUTH, correlated=False)
    before = {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in rows.iterdir()}
    synthetic.write(rows, TRUTH, correlated=False)
    after = {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in rows.iterdir()}
    assert after == before
    (rows / "activations-00000.npy").unlink()
    synthetic.write(rows, TRUTH, correlated=False)
    assert (rows / "activations-00000.npy").read_bytes() == before[
        "activations-00000.npy"
    ][1]


def test_rows_of_other_features_are_refused(tmp_path):
    rows = synthetic.write(tmp_path / "rows", TRUTH, correlated=False)
    with pytest.raises(UserError, match="other features"):
        synthetic.write(rows, TRUTH, correlated=True)


@pytest.mark.parametrize("change", [{"group": 7}, {"active": 60}])
def test_impossible_sizes_are_refused(change):
    with pytest.raises(UserError, match="n_features=64"):
        synthetic.make_features(dataclasses.replace(TRUTH, **change), correlated=True)


def test_the_features_themselves_are_recovered(features, rng):
    shuffled = rng.permutation(features.directions) * 3
    assert recovery.of_directions(shuffled, features.directions) == {
        "recovered": 1.0,
        "mean_max_cosine": pytest.approx(1),
        "duplicates": 0.0,
        "merged": 0.0,
    }


def test_a_latent_twice_is_a_duplicate(features):
    d = features.directions
    found = recovery.of_directions(np.concatenate([d[:10], d[:1], d[:1]]), d)
    assert found["duplicates"] == 2 / 12
    assert found["recovered"] == 10 / 64


def test_a_latent_against_a_feature_is_not_it(features):
    found = recovery.of_directions(-features.directions, features.directions)
    assert found["recovered"] == 0


def test_random_directions_are_not_the_features(features, rng):
    found = recovery.of_directions(rng.standard_normal((64, 32)), features.directions)
    assert found["recovered"] == 0 and found["duplicates"] == 0
    assert found["mean_max_cosine"] < 0.6


def test_a_sum_of_two_features_is_merged():
    eye = np.eye(8)
    merged = recovery.is_merged(np.array([eye[0] + eye[1], eye[2], eye[3]]), eye)
    assert merged.tolist() == [True, False, False]


def test_dead_latents_do_not_count_and_firing_is_marked(features, rng):
    d = features.directions
    truly = features.fires(2000, rng)
    fires = np.concatenate([truly, np.zeros_like(truly)], 1)
    fires[:, 0] = True
    found = recovery.recovery(np.concatenate([d, d]), d, fires=fires, truly=truly)
    assert found["alive"] == 0.5 and found["duplicates"] == 0
    first = truly[:, 0].mean()
    assert found["f1"] == pytest.approx((63 + 2 * first / (1 + first)) / 64)


def test_an_autoencoder_that_never_fires_has_found_nothing(features):
    d, never = features.directions, np.zeros((5, 64), bool)
    found = recovery.recovery(d, d, fires=never, truly=~never)
    assert set(found.values()) == {0.0}


def test_a_difference_is_said_only_where_the_interval_excludes_0():
    assert verdict(interval([0.1, 0.12, 0.11])).startswith("more (+0.11")
    assert verdict(interval([-0.1, -0.12, -0.11])).startswith("fewer (")
    for values in ([0.1, -0.1], [0.1], [0.1, 0.1]):
        assert verdict(interval(values)).startswith("no difference shown")
