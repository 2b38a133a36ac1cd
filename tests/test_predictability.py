"""Whether the token tells when a latent fires: of latents whose answer is known."""

import json

import numpy as np
import pytest
from tiny_runs import call, copied

from vsae_jax.evals import predictability
from vsae_jax.latents.firings import find_firings

CONTEXTS, LENGTH = 200, 50
TOKEN, PAIR, RANDOM, TWO, RARE, ALWAYS = range(6)


@pytest.fixture(scope="module")
def planted():
    """Scores of latents that fire on token 3; on 3 after 5; at random; on 1, and half
    as strongly on each of 2 and 4; on almost nothing; on everything."""
    rng = np.random.default_rng(0)
    token = rng.integers(0, 8, (CONTEXTS, LENGTH))
    before = np.pad(token[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    f = np.zeros((CONTEXTS, LENGTH, 6), np.float32)
    f[..., TOKEN] = token == 3
    f[..., PAIR] = (token == 3) & (before == 5)
    f[..., RANDOM] = rng.random(token.shape) < 0.05
    f[..., TWO] = (token == 1) + 0.5 * ((token == 2) | (token == 4))
    f[0, :5, RARE] = 1
    f[..., ALWAYS] = -1
    context = np.repeat(np.arange(CONTEXTS), LENGTH)
    text = predictability.text_of(token.ravel(), before.ravel(), context)
    firings = find_firings(f.reshape(-1, 6))
    return predictability.scores(firings, text, n_latents=6)


def test_a_latent_for_a_token_is_predicted_by_it(planted):
    assert planted.auc_by_token[TOKEN] == planted.auc_by_bigram[TOKEN] == 1
    assert planted.token_types[TOKEN] == 1
    assert planted.firing_rate[TOKEN] == pytest.approx(1 / 8, abs=0.02)


def test_a_latent_for_two_tokens_needs_both(planted):
    # Among 3 by the token: 7/64 of the other positions are also 3, which ties with it.
    others_on_3 = (7 / 64) / (63 / 64)
    expected = 1 - others_on_3 / 2
    assert planted.auc_by_token[PAIR] == pytest.approx(expected, abs=0.01)
    assert planted.auc_by_bigram[PAIR] == 1


def test_a_random_latent_is_not_predicted(planted):
    assert planted.auc_by_token[RANDOM] == pytest.approx(0.5, abs=0.05)
    assert planted.auc_by_bigram[RANDOM] == pytest.approx(0.5, abs=0.05)
    assert planted.token_types[RANDOM] == 4


def test_types_are_counted_by_activation(planted):
    assert planted.auc_by_token[TWO] == 1
    assert 1 <= planted.token_types[TWO] <= 2


def test_what_fires_too_seldom_or_always_has_no_score(planted):
    for scores in planted[1:]:
        assert np.isnan(scores[RARE])
    assert np.isnan(planted.auc_by_token[ALWAYS])


def test_the_area_is_that_of_all_pairs():
    """Against a plain computation of the definition, with every position compared."""
    rng = np.random.default_rng(1)
    n = 2000
    token = rng.integers(0, 30, n)
    before = np.concatenate([[-1], token[:-1]])
    fires = rng.random(n) < np.where(token < 5, 0.3, 0.02)
    text = predictability.text_of(token, before, np.arange(n) // 20)
    found = predictability.scores(find_firings(fires[:, None] * 1.0), text, n_latents=1)
    learned = np.arange(n) < n // 2
    rate = fires[learned].mean()

    def probability(alike, fallback):
        return ((fires & alike & learned).sum() + fallback) / (
            (alike & learned).sum() + 1
        )

    by_token = np.array([probability(token == t, rate) for t in token])
    by_bigram = np.array(
        [
            probability((token == t) & (before == b), p)
            for t, b, p in zip(token, before, by_token, strict=True)
        ]
    )
    for name, p in (("auc_by_token", by_token), ("auc_by_bigram", by_bigram)):
        on, off = p[~learned & fires][:, None], p[~learned & ~fires]
        expected = ((on > off) + (np.abs(on - off) < 1e-7) / 2).mean()
        assert getattr(found, name)[0] == pytest.approx(expected, abs=1e-3), name


def test_a_run_is_scored_beside_its_baselines(tiny_run, tmp_path):
    run = copied(tiny_run, tmp_path / "topk")
    assert call("evaluate", run=run, evals="predictability") == 0
    result = json.loads((run / "evals" / "predictability.json").read_text())
    metrics = result["metrics"]
    assert 0 < metrics["latents"] <= 32
    assert metrics["auc_by_token_median"] > 0.6
    assert metrics["shuffled_tokens_auc_by_token_median"] == pytest.approx(0.5, abs=0.1)
    assert metrics["random_directions_latents"] > 0
    counted = [each["latents"] for each in result["by_firing_rate"]]
    assert sum(counted) == metrics["latents"]
    known = [auc for auc in result["per_latent"]["auc_by_token"] if auc is not None]
    assert np.median(known) == pytest.approx(metrics["auc_by_token_median"], abs=1e-3)
    assert "auc_by_token_median" in (run / "evals" / "summary.md").read_text()


def test_one_context_is_refused(tiny_run, tmp_path, capsys):
    run = copied(tiny_run, tmp_path / "topk")
    assert call("evaluate", run=run, evals="predictability", num_tokens=16) == 2
    assert "raise --num_tokens" in capsys.readouterr().err
