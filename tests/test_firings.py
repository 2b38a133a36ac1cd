"""The streaming pass against all latents at once in memory."""

import numpy as np
import pytest

from vsae_jax.latents import correlations
from vsae_jax.latents.firings import BINS, FeaturePass, Limits

M, ROWS = 24, 7
LIMITS = Limits(top=4, sample=12, reach=2, prompts=3, per_token=3)


def sparse_latents(contexts: int, *, seed: int = 0, negative: bool = False):
    """f `[contexts, rows, d_sae]` with many equal values, rare and silent latents, and
    some tokens that do not count."""
    rng = np.random.default_rng(seed)
    share = np.linspace(0, 0.5, M)
    fires = rng.random((contexts, ROWS, M)) < share
    size = rng.choice([0.25, 0.5, 1, 1, 3, 40], (contexts, ROWS, M))
    size = size * np.where(rng.random(size.shape) < 0.5, 1, rng.random(size.shape))
    sign = np.where(negative & (rng.random(size.shape) < 0.3), -1, 1)
    counts = rng.random((contexts, ROWS)) < 0.9
    f = np.where(fires & counts[..., None], sign * size, 0).astype(np.float32)
    return f, counts


def streamed(f, counts, *, at_once: int, **limits):
    made = FeaturePass(f.shape[2], limits=LIMITS)
    for start in range(0, len(f), at_once):
        made.add(f[start : start + at_once], counts[start : start + at_once])
    return made.finish(groups=3, examples=2)


@pytest.mark.parametrize("negative", [False, True])
def test_the_numbers_equal_those_of_all_tokens_in_memory(negative):
    f, counts = sparse_latents(40, negative=negative)
    got = streamed(f, counts, at_once=3)
    flat = f.reshape(-1, M)[counts.ravel()].astype(float)
    fired = (flat != 0).sum(0)
    active = [column[column != 0] for column in flat.T]
    assert got["n_tokens"] == counts.sum()
    np.testing.assert_array_equal(got["n_fired"], fired)
    np.testing.assert_allclose(got["firing_rate"], fired / len(flat))
    np.testing.assert_allclose(got["mean_activation"], flat.mean(0), atol=1e-12)
    for i, values in enumerate(active):
        if not len(values):
            assert got["max_activation"][i] == got["mean_when_active"][i] == 0
            continue
        np.testing.assert_allclose(got["mean_when_active"][i], values.mean())
        np.testing.assert_allclose(got["std_when_active"][i], values.std(), atol=1e-7)
        assert abs(got["max_activation"][i]) == np.abs(values).max()


def test_the_histogram_counts_every_firing_in_bins_that_just_hold_it():
    f, counts = sparse_latents(40, negative=True)
    got = streamed(f, counts, at_once=3)
    for i, column in enumerate(f.reshape(-1, M).T):
        values = column[column != 0].astype(float)
        width = got["histogram_width"][i]
        if not len(values):
            assert width == 0 and not got["histogram"][i].any()
            continue
        assert BINS / 2 * width <= np.abs(values).max() < BINS * width
        edges = (np.arange(2 * BINS + 1) - BINS) * width
        expected = np.histogram(values, edges)[0]
        np.testing.assert_array_equal(got["histogram"][i], expected)


def windows(f, counts, token, i):
    """Latent i two tokens around, by the slow way."""
    context, row = divmod(token, ROWS)
    out = []
    for near in range(row - 2, row + 3):
        inside = 0 <= near < ROWS and counts[context, near]
        out.append(f[context, near, i] if inside else np.nan)
    return out


@pytest.mark.parametrize("negative", [False, True])
def test_the_tops_are_the_best_token_of_each_of_the_best_contexts(negative):
    f, counts = sparse_latents(40, negative=negative)
    got = streamed(f, counts, at_once=3)
    for i in range(M):
        size = np.abs(f[:, :, i])
        best = [(-s.max(), c * ROWS + s.argmax()) for c, s in enumerate(size)]
        expected = [token for s, token in sorted(best)[:4] if s < 0]
        token = got["top_token"][i]
        assert token[token >= 0].tolist() == expected
        for slot, one in enumerate(expected):
            expected_window = windows(f, counts, one, i)
            np.testing.assert_array_equal(got["top_values"][i, slot], expected_window)


@pytest.mark.parametrize("at_once", [1, 5, 40])
def test_nothing_depends_on_the_batches(at_once):
    f, counts = sparse_latents(40, negative=True)
    whole, parts = (streamed(f, counts, at_once=n) for n in (40, at_once))
    for name in whole:
        np.testing.assert_allclose(
            parts[name], whole[name], rtol=1e-12, atol=1e-15, err_msg=name
        )


def test_quantile_groups_are_equal_shares_of_all_firings_where_the_sample_holds_all():
    f, counts = sparse_latents(6)
    got = streamed(f, counts, at_once=2)
    few = [i for i in range(M) if 6 <= (f[:, :, i] != 0).sum() <= 12]
    assert few
    for i in few:
        size = np.abs(f[:, :, i]).ravel()
        ranked = sorted(np.flatnonzero(size), key=lambda t: (-size[t], t))
        n = len(ranked)
        assert got["quantile_sampled"][i] == n
        quantiles = np.quantile(size[size > 0], [1, 2 / 3, 1 / 3, 0])
        np.testing.assert_allclose(got["quantile_edges"][i], quantiles, rtol=1e-6)
        for g in range(3):
            group = {t for r, t in enumerate(ranked) if r * 3 // n == g}
            shown = got["quantile_token"][i, g]
            shown = shown[shown >= 0].tolist()
            assert len(shown) == len(set(shown)) == min(len(group), 2)
            assert set(shown) <= group


def test_the_sample_is_uniform_over_the_firings():
    # One latent that fires everywhere, its value the token's number.
    n = 4000
    f = np.tile(np.arange(1, n * ROWS + 1, dtype=np.float32), 1).reshape(n, ROWS, 1)
    made = FeaturePass(1, limits=Limits(sample=400, reach=0))
    for start in range(0, n, 100):
        made.add(f[start : start + 100], np.ones((100, ROWS), bool))
    edges = made.finish()["quantile_edges"][0] / (n * ROWS)
    # The standard error of a sample's quantile: sqrt(q (1 - q) / 400) <= 0.025.
    np.testing.assert_allclose(edges, np.linspace(1, 0, 11), atol=0.09)


def test_correlations_equal_numpys():
    f, counts = sparse_latents(60, negative=True)
    f[..., 5] = 2 * f[..., 20]
    got = streamed(f, counts, at_once=7)
    flat = f.reshape(-1, M)[counts.ravel()].astype(float)
    assert got["correlation_tokens"] == len(flat)
    with np.errstate(invalid="ignore"):
        expected = np.corrcoef(flat.T)
    np.fill_diagonal(expected, -np.inf)
    assert got["correlated_latents"][20, 0] == 5
    for i in range(M):
        row = np.nan_to_num(expected[i], nan=-np.inf)
        best = np.sort(row)[::-1][:10]
        best = best[best > 0]
        np.testing.assert_allclose(got["correlation"][i, : len(best)], best, rtol=1e-5)
        chosen = got["correlated_latents"][i, : len(best)]
        np.testing.assert_allclose(row[chosen], best, rtol=1e-5)
        assert (got["correlated_latents"][i, len(best) :] == -1).all()


@pytest.mark.parametrize("at_once", [1, 9])
def test_a_limit_on_the_correlations_halves_their_tokens(monkeypatch, at_once):
    f, counts = sparse_latents(60)
    monkeypatch.setattr(correlations, "MAX_FIRINGS", 1500)
    got = streamed(f, counts, at_once=at_once)
    assert 20 <= got["correlation_tokens"] <= 130
    again = streamed(f, counts, at_once=60)
    np.testing.assert_array_equal(got["correlation"], again["correlation"])


def test_prompts_hold_the_strongest_latents_of_each_token():
    f, counts = sparse_latents(5, negative=True)
    got = streamed(f, counts, at_once=2)
    assert got["prompt_latents"].shape == (3, ROWS, 3)
    expected = np.sort(np.abs(f[:3]), axis=2)[:, :, ::-1][:, :, :3]
    np.testing.assert_array_equal(np.abs(got["prompt_values"]), expected)
    picked = np.take_along_axis(f[:3], got["prompt_latents"], 2)
    np.testing.assert_array_equal(picked, got["prompt_values"])


def test_latents_that_are_never_zero_are_handled():
    rng = np.random.default_rng(0)
    f = rng.standard_normal((12, ROWS, M)).astype(np.float32)
    got = streamed(f, np.ones((12, ROWS), bool), at_once=5)
    assert (got["firing_rate"] == 1).all()


def test_a_pass_without_any_firing():
    got = streamed(
        np.zeros((3, ROWS, M), np.float32), np.zeros((3, ROWS), bool), at_once=2
    )
    assert not got["n_fired"].any() and (got["top_token"] == -1).all()
    assert (got["quantile_token"] == -1).all() and (got["correlation"] == 0).all()
    assert np.isfinite(got["quantile_edges"]).all()
