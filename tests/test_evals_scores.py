"""Sparse probing, TPP, SCR and absorption on cases whose answers are known."""

import numpy as np
import pytest

from vsae_jax.evals import ablation, absorption, scr, sparse_probing, tpp
from vsae_jax.evals.encoding import CONTEXT, Latents, Pooled
from vsae_jax.evals.probes import Probe, accuracy
from vsae_jax.evals.quirks import NAMES, Quirks
from vsae_jax.evals.sampling import Split
from vsae_jax.evals.tasks import Fitted, Task, mean_metrics

pytest.importorskip("sklearn")

D, CLASSES, N_TRAIN, N_TEST = 8, ("a", "b", "c"), 60, 20
UNIT = np.eye(D, dtype=np.float32)


def class_task(quirks: Quirks = Quirks()) -> tuple[Task, Latents]:
    """x = 2 e_c + noise; the first three of eight latents are the labels, and are what
    x has along e_c."""
    rng = np.random.default_rng(0)
    per_class = N_TRAIN + N_TEST
    labels = np.repeat(np.arange(3), per_class)
    x = 2 * UNIT[labels] + 0.01 * rng.standard_normal((3 * per_class, D))
    f = np.zeros((len(x), D), np.float32)
    f[np.arange(len(x)), labels] = 2
    starts = per_class * np.arange(3)
    split = Split(
        {c: s + np.arange(N_TRAIN) for c, s in zip(CLASSES, starts, strict=True)},
        {
            c: s + N_TRAIN + np.arange(N_TEST)
            for c, s in zip(CLASSES, starts, strict=True)
        },
    )
    pooled = Pooled(x.astype(np.float32), np.full(len(x), 10))
    latents = Latents(f, np.zeros(D, np.float32), UNIT)
    return Task("planted", split, {}, pooled, 42, quirks), latents


def scr_task(quirks: Quirks = Quirks()) -> tuple[Task, Latents]:
    """x = 0.3 label e_0 + 3 attribute e_1: the biased probe reads the attribute. Latent
    1 holds the attribute, latent 0 the label."""
    rng = np.random.default_rng(0)
    n, q = 160, 60
    signs = {"P+": (1, 1), "P-": (1, -1), "N+": (-1, 1), "N-": (-1, -1)}
    each = np.concatenate([np.tile(s, (n, 1)) for s in signs.values()])
    f = np.zeros((4 * n, D), np.float32)
    f[:, 0], f[:, 1] = 0.3 * each[:, 0], 3 * each[:, 1]
    x = f + 0.01 * rng.standard_normal(f.shape).astype(np.float32)
    # 20 a quadrant in testing; P+ and N- have twice as many as the others.
    twice = {name: 2 if name in ("P+", "N-") else 1 for name in signs}
    starts = {name: i * n for i, name in enumerate(signs)}
    split = Split(
        {name: start + np.arange(q * twice[name]) for name, start in starts.items()},
        {
            name: start + 2 * q + np.arange(20 * twice[name])
            for name, start in starts.items()
        },
    )
    pooled = Pooled(x, np.full(len(x), 10))
    latents = Latents(f, np.zeros(D, np.float32), UNIT)
    return Task("planted", Split({}, {}), {"P / N": split}, pooled, 42, quirks), latents


@pytest.fixture(autouse=True)
def few_latents(monkeypatch):
    monkeypatch.setattr(ablation, "NS", (1, 2, 5))


def scores(module, task: Task, latents: Latents) -> dict:
    return module.score(task, module.prepare(task), latents)


def known(train: dict, weights: list, b: float) -> Fitted:
    """Probes that were not trained: the cases are about what is done with them."""
    w = np.array(weights, np.float32)
    return Fitted(Probe(w, np.full(len(w), b, np.float32)), train)


def tpp_scores(task: Task, latents: Latents) -> dict:
    """With probes that ask x_c > 1."""
    fitted = known(task.samples("train", ""), list(UNIT[:3]), -1.0)
    x, tests = task.pooled.x, task.samples("test", "")
    clean = {c: accuracy(fitted.logits(c, x[s.rows]), s) for c, s in tests.items()}
    return tpp.score(task, tpp.Prepared(fitted, clean), latents)


def scr_scores(task: Task, latents: Latents) -> dict:
    """With a biased probe that sees label and attribute."""
    weights = [UNIT[1], UNIT[0], UNIT[0] + UNIT[1]]
    ((pair, split),) = task.quadrants.items()
    train, tests = (scr.samples(task, pair, split, p, "") for p in ("train", "test"))
    fitted = known(train, weights, 0.0)
    clean = scr.accuracies(task, fitted, tests, None)
    before = scr.accuracies(task, fitted, tests, "biased")
    prepared = scr.Prepared({pair: fitted}, {pair: clean}, {pair: before})
    return scr.score(task, prepared, latents)[pair]


def test_a_latent_that_is_the_label_has_top_1_accuracy_1():
    task, latents = class_task()
    by_class = scores(sparse_probing, task, latents)
    assert set(by_class) == set(CLASSES)
    for metrics in by_class.values():
        assert metrics["sae_top_1_test_accuracy"] == 1.0
        assert metrics["sae_test_accuracy"] == 1.0
        assert metrics["llm_test_accuracy"] == 1.0


def test_latents_of_noise_have_an_accuracy_of_a_half():
    task, latents = class_task()
    noise = np.random.default_rng(1).standard_normal(latents.pooled.shape)
    by_class = scores(sparse_probing, task, latents._replace(pooled=noise))
    accuracy = mean_metrics(list(by_class.values()))["sae_top_1_test_accuracy"]
    assert accuracy == pytest.approx(0.5, abs=0.2)


def test_top_k_takes_the_largest_differences_of_either_sign():
    x = np.array([[0.0, -3.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.1]])
    assert sparse_probing.top_k(x, np.array([1.0, 0.0]), 2).tolist() == [1, 2]


def test_ablating_the_label_costs_its_probe_all_and_the_others_nothing():
    task, latents = class_task()
    for metrics in tpp_scores(task, latents).values():
        clean = metrics["tpp_clean_accuracy"]
        assert clean == 1.0
        assert metrics["tpp_threshold_1_intended_diff_only"] == clean - 0.5
        assert metrics["tpp_threshold_1_unintended_diff_only"] == 0.0
        assert metrics["tpp_threshold_1_total_metric"] == clean - 0.5


def test_a_latent_of_two_classes_costs_both_probes():
    task, latents = class_task()
    # One latent for a and b; c has its own.
    f = np.zeros_like(latents.pooled)
    f[:, 0], f[:, 2] = latents.pooled[:, :2].sum(axis=1), latents.pooled[:, 2]
    directions = UNIT.copy()
    directions[0] = UNIT[0] + UNIT[1]
    by_class = tpp_scores(task, Latents(f, latents.at_zero, directions))
    for name, unintended in (("a", 0.25), ("b", 0.25), ("c", 0.0)):
        metrics = by_class[name]
        assert metrics["tpp_threshold_1_intended_diff_only"] == 0.5
        assert metrics["tpp_threshold_1_unintended_diff_only"] == unintended


def test_a_spurious_latent_gives_scr_1_with_one_ablation():
    task, latents = scr_task()
    metrics = scr_scores(task, latents)
    assert metrics["scr_biased_on_label_accuracy"] == pytest.approx(0.5, abs=0.05)
    assert metrics["scr_clean_label_accuracy"] == 1.0
    assert metrics["scr_dir1_threshold_1"] == 1.0
    assert metrics["scr_metric_threshold_1"] == 1.0
    # The other direction has nothing to gain: the biased probe reads the attribute.
    assert metrics["scr_dir2_threshold_1"] == 0.0


def test_without_the_spurious_latent_nothing_is_gained():
    task, latents = scr_task()
    blind = latents.pooled.copy()
    blind[:, 1] = 0
    metrics = scr_scores(task, latents._replace(pooled=blind))
    assert metrics["scr_dir1_threshold_1"] == pytest.approx(0, abs=0.05)


@pytest.mark.parametrize("tie_counts", [True, False])
def test_a_tie_is_the_mean_of_both_directions_or_missing(tie_counts):
    before = {"label": 0.7, "attribute": 0.7}
    metric = scr.combine(before, {1: 0.2, 2: 0.4}, tie_counts=tie_counts)
    assert metric == (pytest.approx(0.3) if tie_counts else None)
    assert (
        scr.combine(before | {"label": 0.6}, {1: 0.2, 2: 0.4}, tie_counts=True) == 0.2
    )
    assert (
        scr.combine(before | {"label": 0.8}, {1: 0.2, 2: 0.4}, tie_counts=True) == 0.4
    )


@pytest.mark.parametrize("module", [sparse_probing, tpp, scr])
def test_permuting_latents_changes_nothing(module):
    task, latents = scr_task() if module is scr else class_task()
    order = np.random.default_rng(3).permutation(D)
    permuted = Latents(
        latents.pooled[:, order], latents.at_zero[order], latents.directions[order]
    )
    first, second = scores(module, task, latents), scores(module, task, permuted)
    for name, metrics in first.items():
        for key, value in metrics.items():
            # A probe on all latents starts from other random weights.
            if key != "sae_test_accuracy":
                assert second[name][key] == value


def test_scores_do_not_depend_on_what_was_scored_before():
    task, latents = class_task()
    prepared = sparse_probing.prepare(task)
    noise = latents._replace(pooled=np.random.default_rng(1).random((240, D)))
    first = sparse_probing.score(task, prepared, latents)
    sparse_probing.score(task, prepared, noise)
    assert sparse_probing.score(task, prepared, latents) == first


def test_ablation_takes_the_mean_of_what_each_token_loses():
    """Token by token against the cheap form, with the leak at masked positions."""
    rng = np.random.default_rng(0)
    n_valid, chosen = np.array([3, 7]), np.array([1, 4])
    f = np.maximum(rng.standard_normal((2, CONTEXT, 6)), 0).astype(np.float32)
    at_zero = np.maximum(rng.standard_normal(6), 0).astype(np.float32)
    x = rng.standard_normal((2, CONTEXT, D)).astype(np.float32)
    valid = np.arange(CONTEXT)[None, :] < n_valid[:, None]
    x[~valid], f[~valid] = 0, at_zero
    directions = rng.standard_normal((6, D)).astype(np.float32)
    changed = x - f[..., chosen] @ directions[chosen]
    pooled = Pooled(x.sum(axis=1) / n_valid[:, None], n_valid)
    mean = (f * valid[..., None]).sum(axis=1) / n_valid[:, None]
    latents = Latents(mean, at_zero, directions)
    for leak in (False, True):
        counted = changed if leak else changed * valid[..., None]
        expected = counted.sum(axis=1) / n_valid[:, None]
        found = ablation.ablated_pooled(
            latents, pooled, np.arange(2), chosen, padding_leak=leak
        )
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_only_latents_with_an_effect_are_ablated_unless_surplus_is_asked_for():
    effects = np.array([0.0, 2.0, -1.0, 3.0])
    strongest = ablation.strongest
    for n, expected in ((1, [3]), (2, [3, 1]), (4, [3, 1])):
        assert strongest(effects, n, surplus=False).tolist() == expected
    assert strongest(effects, 2, surplus=True).tolist() == [3, 1]
    # Three have an effect; those that have none outrank the one that is below 0.
    assert strongest(effects, 4, surplus=True).tolist() == [3, 1, 0]
    assert strongest(np.array([0.0, -2, 1, -1]), 4, surplus=True).tolist() == [2, 0, 3]


def test_a_surplus_is_taken_among_equal_effects_as_torch_takes_it():
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    effects = np.concatenate([rng.random(150), np.zeros(212), -rng.random(150)])
    effects = rng.permutation(effects).astype(np.float32)
    for n in (100, 200, 500):
        # SAEBench: topk of at most as many as are not 0.
        expected = torch.topk(torch.tensor(effects), min(n, 300)).indices.tolist()
        found = ablation.strongest(effects, n, surplus=True)
        assert set(found.tolist()) == set(expected)
        assert np.sum(effects[found] > 0) == min(n, 150)
        assert np.sum(effects[found] == 0) == max(min(n, 300) - 150, 0)


def test_without_torch_a_surplus_that_ties_is_left_out(monkeypatch, capsys):
    monkeypatch.setattr(ablation.importlib.util, "find_spec", lambda name: None)
    effects = np.array([0.0, 2.0, -1.0, 0.0])
    assert ablation.strongest(effects, 2, surplus=True) is None
    assert ablation.strongest(effects, 1, surplus=True).tolist() == [1]
    # All classes together: a mean over some would be of other classes.
    task, latents = class_task(Quirks(surplus_latents=True))
    f = latents.pooled.copy()
    f[:, 3] = f[:, 1]  # rises with b, and points away from b's probe
    f[:, 4:] = 0
    directions = UNIT.copy()
    directions[3] = -UNIT[1]
    by_class = tpp_scores(task, Latents(f, latents.at_zero, directions))
    for metrics in by_class.values():
        assert "tpp_threshold_1_total_metric" in metrics
        assert "tpp_threshold_2_total_metric" not in metrics
    assert "TPP with n = 2 is left out" in capsys.readouterr().out


def test_a_surplus_latent_without_an_effect_still_moves_the_other_probes():
    """Latent 0 stands for a. Latent 1 fires on b and c alone, so that its effect on a
    is 0; ablated with it, it takes b's and c's label from them."""
    pytest.importorskip("torch")
    found = {}
    for surplus in (False, True):
        task, latents = class_task(Quirks(surplus_latents=surplus))
        f = np.zeros((len(latents.pooled), 3), np.float32)
        f[:, 0] = latents.pooled[:, 0]
        f[:, 1] = latents.pooled[:, 1] + latents.pooled[:, 2]
        f[:, 2] = latents.pooled[:, 0]  # an effect below 0: it counts, and is not taken
        directions = np.stack([UNIT[0], UNIT[1] + UNIT[2], -0.5 * UNIT[0]])
        at_zero = np.zeros(3, np.float32)
        found[surplus] = tpp_scores(task, Latents(f, at_zero, directions))["a"]
    intended, unintended = (
        f"tpp_threshold_2_{kind}_diff_only" for kind in ("intended", "unintended")
    )
    assert found[False][intended] == found[True][intended] == 0.5
    assert found[False][unintended] == 0.0
    assert found[True][unintended] == 0.5


def test_effects_of_tpp_leave_out_what_falls():
    task, latents = class_task()
    sample = task.samples("train", "")["a"]
    w = np.ones(D, np.float32)
    signed = ablation.effects(latents, sample, w, positive_only=False)
    clamped = ablation.effects(latents, sample, w, positive_only=True)
    assert signed[0] == clamped[0] == pytest.approx(2)
    assert signed[1] < 0
    assert clamped[1] == 0


def test_resampling_draws_anew_at_every_call():
    calls = [("test", "one"), ("test", "two")]
    for resample in (False, True):
        task, _ = class_task(Quirks(resample=resample))
        one, two = (task.samples(*call)["a"].rows.tolist() for call in calls)
        assert (one == two) is not resample


def test_every_quirk_has_a_sentence():
    assert all(f"{name}: " in (Quirks.__doc__ or "") for name in NAMES)


# Absorption: the letter's direction is e_0; latent 0 is the letter's own.
COSINES = np.array([1.0, 0.8, 0.3, 0.05, 0.0])


def absorbed(f: list[float], projection: float, split=(0,)) -> tuple[float, bool]:
    fraction, full = absorption.word_scores(
        np.array([f]), COSINES, np.array([projection]), np.array(split)
    )
    return float(fraction[0]), bool(full[0])


def test_an_absorbing_latent_is_found():
    assert absorbed([0, 10, 0, 0, 0], 8.0) == (1.0, True)


def test_a_word_that_its_letter_latent_explains_absorbs_nothing():
    assert absorbed([8, 0, 0, 0, 9], 8.0) == (0.0, False)


def test_a_split_latent_is_not_an_absorber():
    assert absorbed([0, 10, 0, 0, 0], 8.0, split=(0, 1)) == (0.0, False)


def test_a_partly_absorbed_word_has_a_fraction():
    # The letter's latent gives 4 of 10, the absorber 8 * 0.8 = 6.4, of which 6 count.
    fraction, full = absorbed([4, 8, 0, 0, 0], 10.0)
    assert fraction == pytest.approx(6 / 10)
    assert not full


def test_latents_that_do_not_point_along_the_letter_are_no_absorbers():
    assert absorbed([0, 0, 0, 200, 0], 10.0) == (0.0, True)
    assert absorbed([0, 0, 0, 0, 200], 10.0) == (0.0, False)


def test_a_small_share_is_no_absorption():
    assert absorbed([0, 4, 0, 0, 0], 10.0) == (0.0, False)


def test_three_absorbers_count_at_most():
    f = np.full((1, 6), 1.0)
    f[0, 0] = 0
    fraction, _ = absorption.word_scores(
        f, np.array([1.0, 0.5, 0.5, 0.5, 0.5, 0.5]), np.array([3.0]), np.array([0])
    )
    # 1.5 of 3 is enough; five latents would have 2.5.
    assert fraction[0] == 1.0
    fraction, _ = absorption.word_scores(
        f, np.array([1.0, 0.5, 0.5, 0.5, 0.5, 0.5]), np.array([4.0]), np.array([0])
    )
    assert fraction[0] == 0.0


@pytest.mark.parametrize(
    ("f1", "count"),
    [([0.5, 0.52], 1), ([0.5, 0.54, 0.58], 3), ([0.5, 0.54, 0.55, 0.9], 2), ([0.5], 1)],
)
def test_splitting_stops_at_the_first_latent_that_does_not_help(f1, count):
    assert len(absorption.split_latents(f1, np.arange(10))) == count
