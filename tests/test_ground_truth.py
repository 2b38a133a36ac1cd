"""Rows of known features, and measures of what was found of them."""

import dataclasses
import json

import numpy as np
import pytest

from experiments import family, ground_truth, recovery, synthetic, tree
from experiments.family import (
    STABILITY,
    Case,
    Point,
    Setting,
    at_l0,
    choose,
    further_settings,
)
from experiments.ground_truth import MEASURES
from experiments.scales import SCALES, Truth
from experiments.study import Study
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


def test_sampling_in_the_vsae_stands_beside_the_differences_to_topk():
    seeds = {seed: dict.fromkeys(ground_truth.COMPARED, seed) for seed in (0.0, 1.0)}
    more = {seed: dict.fromkeys(ground_truth.COMPARED, seed + 1) for seed in seeds}
    of_way = {"topk": seeds, "vsae": more}
    effects = ground_truth._effects({"independent": of_way})
    assert list(effects) == ["vsae"]
    of_way["vsae_no_noise"] = seeds
    effects = ground_truth._effects(dict.fromkeys(ground_truth.WAYS, of_way))
    assert list(effects) == ["vsae", "vsae_no_noise", "vsae against vsae_no_noise"]
    for by_measure in effects.values():
        assert len(by_measure) == len(ground_truth.WAYS) * len(ground_truth.COMPARED)
    means = {kind: {i.mean for i in each.values()} for kind, each in effects.items()}
    assert list(means.values()) == [{1.0}, {0.0}, {1.0}]


def test_latents_that_return_are_true_or_false():
    eye = np.eye(8)
    mixed = (eye[4] + eye[5]) / 2**0.5
    ours = np.array([eye[0], eye[1], mixed, eye[3]])
    theirs = np.array([eye[0], mixed, eye[6]])
    assert recovery.returning(ours, theirs, eye) == {
        "returns": 0.5,
        "returning_true": 0.5,
        "returning_near": 1.0,
        "true_return": pytest.approx(1 / 3),
        "false_return": 1.0,
    }
    assert recovery.returning(eye, -eye, eye)["returning_true"] is None
    assert recovery.returning(eye, eye[:0], eye)["returns"] == 0


@pytest.fixture
def gated(tmp_path):
    return Case(Study(SCALES["smoke"], tmp_path, {}), "independent", "gated")


def points_of(case, by_rate):
    (norm,) = case.norms
    return [
        Point(Setting(norm, lr, weight), l0, explained)
        for lr, of_rate in by_rate.items()
        for weight, l0, explained in of_rate
    ]


def test_the_weight_at_an_l0_lies_between_those_around_it(gated):
    points = points_of(gated, {1e-3: [(0.4, 2.0, 0.5), (0.1, 8.0, 0.9)]})
    between = at_l0(points, 4)
    assert between.setting.weight == pytest.approx(0.2) and between.l0 == 4
    assert between.explained_variance == pytest.approx(0.7)
    assert at_l0(points, 9) == points[1] and at_l0(points, 1) == points[0]


def test_the_best_rate_is_one_that_comes_to_the_l0(gated):
    (norm,) = gated.norms
    around = [(0.1, 8.0, 0.8), (0.4, 2.0, 0.6)]
    points = points_of(
        gated, {1e-3: [(0.1, 9.0, 0.95)], 1e-2: around, 1e-1: [(0.1, 4.1, 0.6)]}
    )
    choice = choose(gated, norm, points)
    assert choice.setting.lr == 1e-2 and choice.l0 == 4 and choice.inside


def test_a_search_goes_on_until_rate_and_weight_are_inside(gated):
    (norm,) = gated.norms
    ends = {1e-3: [(0.2, 4.0, 0.8)], 1e-2: [(0.2, 4.0, 0.9)]}
    points = points_of(gated, ends)
    wider = further_settings(gated, choose(gated, norm, points), points)
    assert [s.lr for s in wider] == pytest.approx([0.1] * len(gated.weights))
    assert [s.weight for s in wider] == list(gated.weights)
    points += points_of(gated, {1e-1: [(0.2, 4.0, 0.5)]})
    assert further_settings(gated, choose(gated, norm, points), points) == []


def test_a_weight_is_moved_where_no_rate_comes_to_the_l0(gated):
    (norm,) = gated.norms
    rates = {1e-3: 8.0, 1e-2: 6.0, 1e-1: 9.0}
    points = points_of(gated, {lr: [(0.2, l0, 0.5)] for lr, l0 in rates.items()})
    choice = choose(gated, norm, points)
    (further,) = further_settings(gated, choice, points)
    assert further == Setting(norm, 1e-2, 0.4)


def test_the_family_is_drawn_from_its_files(gated):
    """Results that were made elsewhere: no rows, no training."""
    study = gated.study
    for case in family.cases(study):
        (norm,) = case.norms
        measures = dict.fromkeys([*MEASURES, *STABILITY, "explained_variance"], 0.5)
        seeds = {str(seed): measures | {"l0": 4.0 + seed} for seed in range(3)}
        chosen = [norm, 0.01, 0.25, 4.0, 0.5, case.variant == "relu"]
        found = {"searched": [], "chosen": [chosen], "arms": {f"{norm:g}": seeds}}
        case.file.parent.mkdir(parents=True, exist_ok=True)
        case.file.write_text(json.dumps(found))
    section = family.run(study)
    tables = [part for part in section.parts if isinstance(part, list)]
    lines = {line[0]: line[1:5] for line in tables[0]}
    assert lines["relu"] == ["0.01", "0.25", "3", "5.0 ± 1.0 (off)"]
    assert lines["topk"][0] == "0.01 (an end)"
    assert tables[1][1][:2] == ["vsae_topk - topk", "+0.0 [+0.0, +0.0]"]
    assert {path.name for path in study.out.iterdir()} == {"family", "figures"}


def test_children_fire_with_their_parent_and_one_at_a_time(rng):
    fires = tree.firings(MANY, rng)
    for parent in tree.PARENTS:
        children = fires[:, tree.children(parent)]
        assert not children[~fires[:, parent]].any()
        assert children.sum(1).max() == 1
        assert fires[:, parent].mean() == pytest.approx(tree.PARENT_RATE, abs=0.01)
        rates = children[fires[:, parent]].mean(0)
        assert rates == pytest.approx(tree.CHILD_RATE, abs=0.03)


@pytest.mark.parametrize("absorbed", [False, True])
def test_an_absorbed_parent_is_seen_in_its_childrens_latents(absorbed, rng):
    directions = np.eye(tree.N_FEATURES)
    fires = tree.firings(1000, rng)
    w_dec, f = 2 * directions, fires.astype(float)
    for parent in tree.PARENTS if absorbed else ():
        children = tree.children(parent)
        w_dec[children, parent] = 2
        f[:, parent] *= ~fires[:, children].any(1)
    order = rng.permutation(tree.N_FEATURES)
    found = tree.of_children(w_dec[order], f[:, order], directions, fires)
    half = 0.5**0.5
    assert list(found.values()) == pytest.approx(
        [half, half, 1.0] if absorbed else [1.0, 0.0, 0.0]
    )
