"""The module: what encode, decode, forward and fold compute."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vsae_jax.autoencoder import posterior, sae
from vsae_jax.autoencoder.module import SAE
from vsae_jax.config import SAEConfig
from vsae_jax.system.errors import UserError

D, M, K = 8, 24, 5


def config(**switches) -> SAEConfig:
    return SAEConfig(**{"d_model": D, "d_sae": M, "k": K} | switches)


VARIANTS = {
    "vsae_topk": {},
    "topk": {"relu": True, "noise": False, "penalty": "none"},
    "relu": {"sparsity": "none", "relu": True, "noise": False, "penalty": "l1"},
    "vsae": {"sparsity": "none"},
    "released": {
        "relu": True,
        "noise": False,
        "subtract_b_dec": False,
        "decoder_norm": "free",
        "selection": "magnitude",
    },
    "learned": {"variance": "learned"},
    "learned, b_dec kept": {"variance": "learned", "subtract_b_dec": False},
    "batch_topk": {"sparsity": "batch_topk", "relu": True},
    "jump_relu": {"sparsity": "jump_relu", "subtract_b_dec": False},
    "nested": {"sparsity": "batch_topk", "relu": True, "prefixes": "2:3:12"},
    "gated": {"sparsity": "none", "relu": True, "gate": "path"},
    "gated, b_dec kept": {
        "sparsity": "none",
        "gate": "path",
        "subtract_b_dec": False,
    },
    "vaease": {"sparsity": "none", "gate": "sigma", "variance": "learned"},
}


def trained(c: SAEConfig):
    """Variables with every array away from its start."""
    rng = np.random.default_rng(0)
    variables = sae.init(jax.random.key(0), c, scale=3.5, mean=rng.normal(size=D))
    params = {
        name: jnp.asarray(rng.normal(size=a.shape), jnp.float32)
        for name, a in variables["params"].items()
    }
    norm = variables["norm"]
    if "threshold" in norm:
        norm = norm | {"threshold": jnp.float32(2.5)}
    return {"params": params, "norm": norm}


@pytest.fixture
def x():
    return jnp.asarray(np.random.default_rng(1).normal(size=(16, D)), jnp.float32)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_keeps_the_protocol(name, x, key):
    c = config(**VARIANTS[name])
    model, variables = SAE(c), trained(c)
    f = model.apply(variables, x, method="encode")
    assert f.shape == (16, M)
    if c.sparsity == "topk":
        assert ((f != 0).sum(axis=1) <= K).all()
    np.testing.assert_array_equal(
        model.apply(variables, x), model.apply(variables, f, method="decode")
    )
    out = sae.forward(
        variables["params"],
        x,
        {"k": K, "noise_std": 1.0, "bandwidth": 0.1},
        config=c,
        key=key,
    )
    assert out.x_hat_n.shape == x.shape and out.mu.shape == f.shape
    assert (out.log_var is not None) == (c.variance == "learned")


def test_encode_is_the_formula(x):
    c = config(relu=True)
    variables = trained(c)
    p = {n: np.asarray(a, np.float64) for n, a in variables["params"].items()}
    scale, mean = 3.5, np.asarray(variables["norm"]["mean"], np.float64)
    x_n = scale * (np.asarray(x, np.float64) - mean)
    mu = np.maximum((x_n - p["b_dec"]) @ p["w_enc"] + p["b_enc"], 0)
    kth = np.sort(mu, axis=1)[:, -K][:, None]
    f = np.where(mu >= kth, mu, 0)
    x_hat = (f @ p["w_dec"] + p["b_dec"]) / scale + mean
    model = SAE(c)
    np.testing.assert_allclose(
        model.apply(variables, x, method="encode"), f, rtol=1e-4, atol=1e-4
    )
    np.testing.assert_allclose(model.apply(variables, x), x_hat, rtol=1e-4, atol=1e-4)


def test_evaluation_uses_the_mean_and_training_samples(x, key):
    c = config()
    model, variables = SAE(c), trained(c)

    def forward(key, noise_std=1.0):
        numbers = {"k": K, "noise_std": noise_std}
        return model.apply(variables, x, numbers, key=key, method="forward").f

    assert (forward(key) != forward(None)).any()
    assert (forward(key) != forward(jax.random.key(1))).any()
    np.testing.assert_array_equal(forward(key), forward(key))
    np.testing.assert_array_equal(forward(key, 0.0), forward(None))


def test_noise_has_the_learned_variance(key):
    c = config(variance="learned", sparsity="none", subtract_b_dec=False)
    variables = trained(c)
    params = variables["params"] | {
        "w_var": jnp.zeros((D, M)),
        "b_var": jnp.full(M, 2 * np.log(3.0)),
    }
    x_n = jnp.zeros((4000, D))
    out = sae.forward(params, x_n, {"noise_std": 0.5}, config=c, key=key)
    np.testing.assert_allclose(jnp.std(out.f - out.mu), 1.5, rtol=0.02)


@pytest.mark.parametrize("norm", [1.0, 0.1])
def test_init_is_tied_with_rows_of_the_given_norm(norm):
    variables = sae.init(jax.random.key(0), config(), decoder_init_norm=norm)
    p = variables["params"]
    np.testing.assert_allclose(jnp.linalg.norm(p["w_dec"], axis=1), norm, rtol=1e-5)
    np.testing.assert_array_equal(p["w_enc"], p["w_dec"].T)
    assert (p["b_enc"] == 0).all() and (p["b_dec"] == 0).all()


def test_a_start_is_times_the_flag_that_its_array_names():
    c = config(sparsity="jump_relu")
    theta = sae.init(jax.random.key(0), c, threshold_init=0.5)["params"]["theta"]
    np.testing.assert_array_equal(theta, np.full(M, 0.5, np.float32))
    with pytest.raises(TypeError, match="no array starts by .'threshold_innit'"):
        sae.init(jax.random.key(0), c, threshold_innit=0.5)


def test_init_depends_on_the_key_alone():
    first = sae.init(jax.random.key(3), config(relu=True, noise=False))
    second = sae.init(jax.random.key(3), config())
    other = sae.init(jax.random.key(4), config())
    w = [v["params"]["w_dec"] for v in (first, second, other)]
    np.testing.assert_array_equal(w[0], w[1])
    assert (w[0] != w[2]).any()


@pytest.mark.parametrize("name", VARIANTS)
def test_fold_is_the_same_autoencoder_on_raw_activations(name, x):
    c = config(**VARIANTS[name])
    variables = trained(c)
    if c.gate == "sigma":  # some open, some closed
        b_var = jnp.linspace(-4, 0, M)
        params = variables["params"] | {"w_var": jnp.zeros((D, M)), "b_var": b_var}
        variables = {**variables, "params": params}
    folded, folded_config = sae.fold(variables, c)
    assert folded["norm"]["scale"] == 1 and (folded["norm"]["mean"] == 0).all()
    before, after = SAE(c), SAE(folded_config)
    f = before.apply(variables, x, method="encode")
    np.testing.assert_allclose(
        after.apply(folded, x, method="encode"), f, rtol=1e-5, atol=1e-4
    )
    np.testing.assert_allclose(
        after.apply(folded, x), before.apply(variables, x), rtol=1e-5, atol=1e-4
    )
    if c.variance == "learned":
        log_variance = posterior.log_variance
        np.testing.assert_allclose(
            log_variance(folded["params"], x, config=folded_config),
            log_variance(variables["params"], sae.normalise(variables, x), config=c),
            rtol=1e-5,
            atol=1e-4,
        )


def test_geometric_median_resists_an_outlier():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(201, 3)) + 5.0
    x[0] = 1e4
    median = sae.geometric_median(jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(median, [5.0, 5.0, 5.0], atol=0.4)
    from_three = sae.geometric_median(jnp.array([[0.0], [1.0], [10.0]]))
    np.testing.assert_allclose(from_three, [1.0], atol=1e-3)


def test_k_above_d_sae_is_refused():
    with pytest.raises(UserError, match="k=25 must lie between 1 and d_sae=24"):
        config(k=25)
    assert dataclasses.replace(config(), sparsity="none", k=25).k == 25
