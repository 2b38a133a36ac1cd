"""Metrics: analytic cases, float64 NumPy, and what a batch may and may not change."""

import jax.numpy as jnp
import numpy as np
import pytest

from vsae_jax.autoencoder.density import (
    DENSITY_EDGES,
    density_histogram,
    density_metrics,
)
from vsae_jax.evals.metrics import Reconstruction, batch_sums
from vsae_jax.system.errors import UserError

TOKENS, D_MODEL, D_SAE = 60, 8, 20
# A norm that about a third of the rows exceed.
LIMIT = 4.0
# By SAEBench's definition these are means over batches, not over tokens.
PER_BATCH = {"explained_variance_saebench", "explained_variance_legacy"}


@pytest.fixture
def data():
    """x with a mean, x_hat near it, and sparse f with some values below 0."""
    rng = np.random.default_rng(0)
    x = 0.2 * rng.normal(size=(TOKENS, D_MODEL)) * np.arange(1, D_MODEL + 1) + 0.6
    x_hat = 0.8 * x + 0.2 * rng.normal(size=x.shape)
    f = rng.normal(size=(TOKENS, D_SAE)) * (rng.random((TOKENS, D_SAE)) < 0.3)
    f[:, 0] = 0
    return x, x_hat, f, rng.random(TOKENS) < 0.8


def measured(
    x, x_hat, f=None, keep=None, *, batch_size=TOKENS, limit=LIMIT
) -> Reconstruction:
    """The metrics' sums of arrays, taken in batches."""
    f = np.ones((len(x), D_SAE)) if f is None else f
    keep = np.ones(len(x), bool) if keep is None else keep
    total = Reconstruction()
    for i in range(0, len(x), batch_size):
        part = [jnp.asarray(a[i : i + batch_size]) for a in (x, x_hat, f, keep)]
        total.add(batch_sums(*part, limit))
    return total


def reference(batches) -> dict[str, float]:
    """Every metric in float64, from `(x, x_hat, f)` of each batch's kept tokens."""
    x, x_hat, f = (np.concatenate(part) for part in zip(*batches, strict=True))
    error = ((x - x_hat) ** 2).sum(1)
    norm_in, norm_out = np.linalg.norm(x, axis=1), np.linalg.norm(x_hat, axis=1)
    r = np.mean([((a - b) ** 2).sum(1).mean() for a, b, _ in batches])
    s = np.mean([(a**2).sum(1).mean() for a, _, _ in batches])
    legacy = [
        1 - ((a - b) ** 2).sum(1) / ((a - a.mean(0)) ** 2).sum(1) for a, b, _ in batches
    ]
    some = norm_in <= LIMIT
    ordinary = x[some] - x[some].mean(0)
    rate = (f > 0).mean(0)
    share = rate[rate > 0] / rate.sum()
    return {
        "explained_variance": 1 - error.sum() / ((x - x.mean(0)) ** 2).sum(),
        "explained_variance_saebench": 1 - r / (s - (s / D_MODEL) ** 2),
        "explained_variance_legacy": np.concatenate(legacy).mean(),
        "explained_variance_standardised": 1
        - (((x - x_hat) / x.std(0)) ** 2).mean(0).mean(),
        "explained_variance_ordinary_rows": 1 - error[some].sum() / (ordinary**2).sum(),
        "share_ordinary_rows": some.mean(),
        "mse": ((x - x_hat) ** 2).mean(),
        "relative_reconstruction_bias": (norm_out**2).sum() / (x * x_hat).sum(),
        "cossim": ((x * x_hat).sum(1) / (norm_in * norm_out)).mean(),
        "l2_norm_in": norm_in.mean(),
        "l2_norm_out": norm_out.mean(),
        "l2_ratio": (norm_out / norm_in).mean(),
        "l0": (f != 0).sum(1).mean(),
        "l1": np.abs(f).sum(1).mean(),
        "frac_alive": (rate > 0).mean(),
        "frac_alive_above_1e-4": (rate > 1e-4).mean(),
        "frac_alive_above_1e-2": (rate > 1e-2).mean(),
        "n_alive": (rate > 0).sum(),
        "entropy_effective_latents": np.exp(-(share * np.log(share)).sum()),
    }


@pytest.mark.parametrize("batch_size", [TOKENS, 16])
def test_every_metric_equals_float64_numpy(data, batch_size):
    *arrays, keep = data
    batches = [
        [a[i : i + batch_size][keep[i : i + batch_size]] for a in arrays]
        for i in range(0, TOKENS, batch_size)
    ]
    metrics = measured(*data, batch_size=batch_size).metrics()
    expected = reference(batches)
    assert metrics.keys() == expected.keys()
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(value, rel=2e-5), name


@pytest.mark.parametrize("batch_size", [60, 16])
def test_saebenchs_sums_are_by_batches_and_signed(data, batch_size):
    x, x_hat, f, keep = data
    batches = [
        tuple(a[i : i + batch_size][keep[i : i + batch_size]] for a in (x, x_hat, f))
        for i in range(0, TOKENS, batch_size)
    ]
    metrics = measured(*data, batch_size=batch_size).metrics(
        mean_in_variance=True, batch_sums=True
    )
    expected = reference(batches)
    of_tokens = [((a - b) ** 2).sum(1) / len(a) for a, b, _ in batches]
    bias = [(b**2).sum(1).mean() / (a * b).sum(1).mean() for a, b, _ in batches]
    expected |= {
        "explained_variance": expected["explained_variance_saebench"],
        "mse": np.concatenate(of_tokens).mean(),
        "l1": np.concatenate([c.sum(1) for _, _, c in batches]).mean(),
        "relative_reconstruction_bias": np.mean(bias),
    }
    for name in ("explained_variance", "mse", "l1", "relative_reconstruction_bias"):
        assert metrics[name] == pytest.approx(expected[name], rel=1e-4), name


def test_only_what_saebench_averages_over_batches_depends_on_the_batch_size(data):
    whole = measured(*data).metrics()
    for batch_size in (1, 7, 32):
        parts = measured(*data, batch_size=batch_size).metrics()
        for name in whole.keys() - PER_BATCH:
            assert parts[name] == pytest.approx(whole[name], rel=1e-5), name
    for name in PER_BATCH:
        assert parts[name] != pytest.approx(whole[name], rel=1e-5), name


def test_a_massive_dimension_and_massive_rows_are_looked_past():
    """x_hat is 0 but for the dimension and the rows that have nearly all variance."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(4000, D_MODEL))
    x[:, 2] = 1000 + 50 * x[:, 2]
    x_hat = np.zeros_like(x)
    x_hat[:, 2] = x[:, 2]
    metrics = measured(x, x_hat, batch_size=500, limit=np.inf).metrics()
    assert metrics["explained_variance"] > 0.99
    assert metrics["explained_variance_standardised"] == pytest.approx(1 / 8, abs=1e-2)
    x = rng.normal(size=(4000, D_MODEL))
    x[::100] *= 100
    x_hat = np.zeros_like(x)
    x_hat[::100] = x[::100]
    metrics = measured(x, x_hat, batch_size=500, limit=20.0).metrics()
    assert metrics["explained_variance"] > 0.98
    ordinary = metrics["explained_variance_ordinary_rows"]
    assert ordinary == pytest.approx(0, abs=1e-2)
    assert 0.98 < metrics["share_ordinary_rows"] < 0.992


def test_a_dimension_that_does_not_vary_is_left_out(data):
    x, x_hat = data[0].copy(), data[1].copy()
    without = measured(x[:, 1:], x_hat[:, 1:]).metrics()
    x[:, 0], x_hat[:, 0] = 7.0, 9.0
    name = "explained_variance_standardised"
    assert measured(x, x_hat).metrics()[name] == pytest.approx(without[name], rel=1e-5)
    assert measured(np.full((5, 8), 2.0), np.zeros((5, 8))).metrics()[name] is None
    assert measured(x, x_hat, limit=0.0).metrics()["share_ordinary_rows"] == 0
    none = measured(x, x_hat, limit=0.0).metrics()["explained_variance_ordinary_rows"]
    assert none is None


def test_an_identity_explains_everything(data):
    x = data[0]
    metrics = measured(x, x).metrics()
    names = [name for name in metrics if name.startswith("explained")]
    for name in (*names, "cossim", "l2_ratio"):
        assert metrics[name] == pytest.approx(1, abs=1e-6), name
    assert metrics["mse"] == 0


def test_predicting_the_mean_explains_nothing(data):
    x = data[0] + 1
    mean = np.broadcast_to(x.mean(0), x.shape)
    metrics = measured(x, mean, batch_size=7).metrics()
    assert metrics["explained_variance"] == pytest.approx(0, abs=1e-6)
    # SAEBench's leaves the mean in the variance, so that predicting it looks good.
    assert metrics["explained_variance_saebench"] > 0.2


def test_explained_variance_is_no_matter_of_where_the_origin_is(data):
    x, x_hat, *_ = data
    here, there = measured(x, x_hat).metrics(), measured(x + 2, x_hat + 2).metrics()
    name = "explained_variance"
    assert there[name] == pytest.approx(here[name], abs=1e-5)
    assert abs(there[f"{name}_saebench"] - here[f"{name}_saebench"]) > 0.1


@pytest.mark.parametrize("masked", [0.0, 1e6, np.inf, np.nan])
def test_what_is_masked_is_no_matter(data, masked):
    x, x_hat, f, keep = data
    expected = measured(x[keep], x_hat[keep], f[keep]).metrics()
    for array in (x, x_hat, f):
        array[~keep] = masked
    metrics = measured(x, x_hat, f, keep).metrics()
    assert metrics == pytest.approx(expected, rel=1e-5)


def test_a_batch_without_kept_tokens_changes_nothing(data):
    total = measured(*data)
    expected = total.metrics()
    x, x_hat, f, _ = (jnp.asarray(a) for a in data)
    total.add(batch_sums(x, x_hat, f, jnp.zeros(TOKENS, bool)))
    assert total.metrics() == expected


def test_no_kept_token_at_all_is_said(data):
    x, x_hat, f, keep = data
    with pytest.raises(UserError, match="nothing to measure"):
        measured(x, x_hat, f, np.zeros_like(keep)).metrics()


def test_equal_rows_have_no_explained_variance(data):
    x = np.repeat(data[0][:1], TOKENS, axis=0)
    metrics = measured(x, x + 1).metrics()
    assert metrics["explained_variance"] is None
    assert metrics["mse"] == pytest.approx(1)


def test_a_zero_reconstruction_has_no_direction_but_no_nan_either(data):
    metrics = measured(data[0], np.zeros_like(data[0])).metrics()
    assert metrics["cossim"] == metrics["l2_ratio"] == 0


def test_codes_below_zero_count_in_l0_but_are_not_alive():
    f = np.tile([-1.0, 2.0, 0.0, 0.0], (5, 1))
    metrics = measured(np.ones((5, 3)), np.ones((5, 3)), f).metrics()
    assert (metrics["l0"], metrics["l1"]) == (2, 3)
    assert (metrics["frac_alive"], metrics["n_alive"]) == (0.25, 1)


def test_uniform_rates_make_every_latent_effective():
    metrics = density_metrics(np.full(50, 0.02))
    assert metrics["entropy_effective_latents"] == pytest.approx(50)
    metrics = density_metrics(np.array([0.5, 0.5, 0, 0, 0, 0]))
    assert metrics["entropy_effective_latents"] == pytest.approx(2)
    assert metrics["frac_alive"] == pytest.approx(1 / 3)


def test_dead_everywhere_is_zero_and_not_nan():
    metrics = density_metrics(np.zeros(5))
    assert metrics["entropy_effective_latents"] == metrics["frac_alive"] == 0


def test_alive_at_a_rate_means_above_it():
    metrics = density_metrics(np.array([0, 5e-5, 1e-4, 5e-3, 1e-2, 0.5]))
    rates = ("frac_alive", "frac_alive_above_1e-4", "frac_alive_above_1e-2")
    assert [6 * metrics[name] for name in rates] == pytest.approx([5, 3, 1])


def test_every_latent_is_in_the_histogram_once():
    density = np.array([0, 0, 1e-9, 1e-6, 2e-3, 0.3, 1.0])
    histogram = density_histogram(density)
    counts, edges = np.array(histogram["counts"]), histogram["log10_edges"]
    assert histogram["never"] == 2
    assert counts.sum() + histogram["never"] == len(density)
    assert len(edges) == len(counts) + 1 and edges == DENSITY_EDGES.tolist()
    # Rarer than the first edge goes into the first bin, always into the last.
    assert (counts[0], counts[-1]) == (2, 1)
    (bin_of_2e_3,) = np.flatnonzero(np.diff(edges < np.log10(2e-3)))
    assert counts[bin_of_2e_3] == 1
