"""Each loss against a float64 NumPy reference, and its gradient against differences."""

import dataclasses
import inspect
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vsae_jax import losses
from vsae_jax.autoencoder import noise
from vsae_jax.config import SAEConfig

B, D, M, K = 16, 6, 20, 4


@pytest.fixture
def params():
    rng = np.random.default_rng(0)
    w_dec = rng.normal(size=(M, D))
    return {
        "w_enc": jnp.asarray(rng.normal(size=(D, M)), jnp.float32),
        "b_enc": jnp.asarray(rng.normal(size=M), jnp.float32),
        "w_dec": jnp.asarray(w_dec, jnp.float32),
        "b_dec": jnp.asarray(rng.normal(size=D), jnp.float32),
    }


@pytest.fixture
def x():
    return jnp.asarray(np.random.default_rng(1).normal(size=(B, D)), jnp.float32)


def variance_head(params):
    rng = np.random.default_rng(2)
    return params | {
        "w_var": jnp.asarray(0.3 * rng.normal(size=(D, M)), jnp.float32),
        "b_var": jnp.asarray(0.3 * rng.normal(size=M), jnp.float32),
    }


def numpy_loss(params, x, eps, numbers, config, dead=None, *, held=None):
    """The formulas of the module's docstring, in float64. `held`: the parameters of
    what has no gradient, where they are others."""
    p = {name: np.asarray(a, np.float64) for name, a in params.items()}
    held = params if held is None else held
    x, eps = np.asarray(x, np.float64), np.asarray(eps, np.float64)
    added = {"latents": 0.0, "input": 0.0, "kept": 0.0}
    added[config.noise_at] = numbers["noise_std"] * eps if config.noise else 0.0
    x_in = x + added["input"] - (p["b_dec"] if config.subtract_b_dec else 0)
    mu = x_in @ p["w_enc"] + p["b_enc"]
    gate = mu
    if config.gate == "path":
        mu = np.exp(p["r_mag"]) * (x_in @ p["w_enc"]) + p["b_mag"]
    mu = np.maximum(mu, 0) if config.relu else mu
    s = np.exp(0.5 * (x_in @ p["w_var"] + p["b_var"])) if "w_var" in p else 1.0
    z = mu + s * added["latents"]
    z = z * {"none": 1, "path": gate > 0, "sigma": 1 - s}[config.gate]
    rank = np.abs(z) if config.selection == "magnitude" else z
    mask = np.ones(z.shape, bool)
    if config.sparsity == "topk":
        kth = np.sort(rank, axis=1)[:, -numbers["k"]][:, None]
        mask = rank >= kth
    if config.sparsity == "batch_topk":
        mask = z >= np.sort(z, axis=None)[-numbers["k"] * len(z)]
    if config.sparsity == "jump_relu":
        mask = z > p["theta"]
    f = np.where(mask, z, 0)
    clean, f = f, f * (1 + added["kept"])
    x_hat = f @ p["w_dec"] + p["b_dec"]
    loss = np.sum((x - x_hat) ** 2, axis=1)
    error = loss.mean()
    for width in config.widths:
        inner = f[:, :width] @ p["w_dec"][:width] + p["b_dec"]
        loss = loss + numbers["nested"] * np.sum((x - inner) ** 2, axis=1)
    if config.gate == "path":
        positive = np.maximum(gate, 0)
        w, b = (np.asarray(held[name], np.float64) for name in ("w_dec", "b_dec"))
        of_gate = np.sum((x - positive @ w - b) ** 2, axis=1)
        loss = loss + numbers["gate_error"] * of_gate
        loss = loss + numbers["gate_l1"] * positive.sum(axis=1)
    kl = 0.5 * (mu**2 + s**2 - 1 - np.log(s**2))
    if config.kl_over == "selected":
        kl = np.where(mask, kl, 0)
    if config.kl_units == "error":
        if held is not params:
            plain = dataclasses.replace(config, penalty="none")
            error = numpy_loss(held, x, eps, numbers, plain)
        kl = kl * 2 * error / D
    if config.penalty == "kl":
        loss = loss + numbers["beta"] * kl.sum(axis=1)
    if config.penalty == "l1":
        loss = loss + numbers["l1"] * np.abs(clean).sum(axis=1)
    if config.l0:
        l0, target = mask.sum(axis=1), numbers["target_l0"]
        loss = loss + numbers["l0"] * ((l0.mean() / target - 1) ** 2 if target else l0)
    if config.auxk and dead is not None and dead.any():
        loss = loss + numbers["auxk"] * numpy_auxk(p, x, x_hat, mu, dead, config)
    return loss.mean()


def numpy_auxk(p, x, x_hat, mu, dead, config):
    candidates = np.where(dead, np.maximum(mu, 0), 0)
    kth = np.sort(candidates, axis=1)[:, -config.k_aux][:, None]
    f_aux = np.where(candidates >= kth, candidates, 0)
    residual = x - x_hat
    error = np.sum((residual - f_aux @ p["w_dec"]) ** 2, axis=1)
    if config.auxk_units == "variance":
        error = error / np.mean(np.sum((residual - residual.mean(0)) ** 2, axis=1))
    return error


PLAIN = {"noise": False, "penalty": "none"}
CASES = {
    "topk": {"relu": True, "noise": False, "penalty": "none"},
    "relu": {"sparsity": "none", "relu": True, "noise": False, "penalty": "l1"},
    "vsae": {"sparsity": "none"},
    "vsae_topk": {},
    "noise at the input": {"noise_at": "input"},
    "noise at what is kept": {"noise_at": "kept", "auxk": True},
    "learned variance": {"variance": "learned"},
    "kl over selected": {"kl_over": "selected", "variance": "learned"},
    "magnitude": {"selection": "magnitude", "noise": False},
    "b_dec kept": {"subtract_b_dec": False},
    "auxk": {"relu": True, "noise": False, "penalty": "none", "auxk": True},
    "auxk by variance": {"auxk": True, "auxk_units": "variance"},
    "topk by lax": {"top_k": "lax"},
    "batch_topk": {"sparsity": "batch_topk", "relu": True} | PLAIN,
    "vsae_batch_topk": {"sparsity": "batch_topk", "variance": "learned"},
    "jump_relu": {"sparsity": "jump_relu", "l0": True} | PLAIN,
    "vsae_jump_relu": {"sparsity": "jump_relu", "l0": True, "auxk": True},
    "gated": {"sparsity": "none", "gate": "path", "relu": True} | PLAIN,
    "vsae_gated": {"sparsity": "none", "gate": "path", "subtract_b_dec": False},
    "matryoshka": {"sparsity": "batch_topk", "relu": True, "prefixes": "3:8"} | PLAIN,
    "vaease": {"sparsity": "none", "gate": "sigma", "variance": "learned"}
    | {"kl_units": "error"},
}


def make(name, params):
    switches = dict(CASES[name])
    if switches.get("variance") == "learned":
        params = variance_head(params)
    if switches.get("sparsity") == "jump_relu":
        params = params | {"theta": jnp.linspace(0.2, 1.5, M)}
    if switches.get("gate") == "path":
        params = params | {"r_mag": jnp.linspace(-0.5, 0.5, M), "b_mag": jnp.ones(M)}
    config = SAEConfig(d_model=D, d_sae=M, k=K, k_aux=3, **switches)
    return params, config


def drawn(key, config):
    """The standard normals of a batch."""
    return noise.normal(key, (B, D if config.noise_at == "input" else M))


NUMBERS = {"k": K, "beta": 0.3, "noise_std": 0.7, "l1": 0.2, "auxk": 0.5}
NUMBERS |= {"l0": 0.4, "target_l0": 3.0, "bandwidth": 0.8}
NUMBERS |= {"gate_l1": 0.3, "gate_error": 0.8, "nested": 0.6}
DEAD = np.arange(M) % 3 == 0


@pytest.mark.parametrize("name", CASES)
def test_loss_equals_numpy(name, params, x, key):
    params, config = make(name, params)
    loss, info = losses.total_loss(
        params, x, key, NUMBERS, jnp.asarray(DEAD), config=config
    )
    expected = numpy_loss(params, x, drawn(key, config), NUMBERS, config, DEAD)
    np.testing.assert_allclose(loss, expected, rtol=2e-6)
    np.testing.assert_allclose(info.loss, loss)


@pytest.mark.parametrize("name", [n for n in CASES if "auxk" not in n])
def test_gradient_equals_finite_differences(name, params, x, key):
    params, config = make(name, params)
    gradient = jax.grad(
        lambda p: losses.total_loss(p, x, key, NUMBERS, config=config)[0]
    )(params)
    eps = np.asarray(drawn(key, config))
    rng = np.random.default_rng(3)
    for array_name, array in params.items():
        if array_name == "theta":  # straight through: the test below
            continue
        for _ in range(4):
            place = tuple(rng.integers(0, n) for n in array.shape)
            step = np.zeros(array.shape)
            step[place] = 1e-6
            up, down = (
                numpy_loss(
                    params | {array_name: np.asarray(array, np.float64) + sign * step},
                    x,
                    eps,
                    NUMBERS,
                    config,
                    held=params,
                )
                for sign in (1, -1)
            )
            difference = (up - down) / 2e-6
            np.testing.assert_allclose(
                gradient[array_name][place], difference, rtol=2e-4, atol=2e-5
            )


@pytest.mark.parametrize("target", [0.0, 3.0])
def test_a_threshold_has_the_gradient_of_a_rectangle(target, params, x):
    """Rajamanoharan et al. 2024b, equations 11 and 12, in float64."""
    params, config = make("jump_relu", params)
    numbers = NUMBERS | {"target_l0": target}
    got = jax.grad(lambda p: losses.total_loss(p, x, None, numbers, config=config)[0])(
        params
    )
    p = {name: np.asarray(a, np.float64) for name, a in params.items()}
    z = (np.asarray(x, np.float64) - p["b_dec"]) @ p["w_enc"] + p["b_enc"]
    on, width = z > p["theta"], numbers["bandwidth"]
    near = (np.abs(z - p["theta"]) < width / 2) / width
    assert 20 < np.count_nonzero(near) < near.size / 2
    x_hat = np.where(on, z, 0) @ p["w_dec"] + p["b_dec"]
    of_f = 2 / B * (x_hat - np.asarray(x, np.float64)) @ p["w_dec"].T
    of_l0 = numbers["l0"] / B
    if target:
        of_l0 *= 2 * (on.sum(axis=1).mean() / target - 1) / target
    expected = -np.sum(near * (p["theta"] * of_f + of_l0), axis=0)
    np.testing.assert_allclose(got["theta"], expected, rtol=1e-4, atol=1e-4)


def test_parts_are_unreduced_and_check_shapes(x):
    assert losses.squared_error(x, x).shape == (B,)
    assert losses.gaussian_kl(x).shape == (B,)
    assert losses.l1_norm(x).shape == (B,)
    with pytest.raises(ValueError, match="shapes differ"):
        losses.squared_error(x, x[:, :1])
    with pytest.raises(ValueError, match="shapes differ"):
        losses.gaussian_kl(x, x[:1])


def test_kl_is_zero_at_the_prior_and_matches_monte_carlo(key):
    zero = jnp.zeros((3, 5))
    np.testing.assert_array_equal(losses.gaussian_kl(zero, zero), np.zeros(3))
    mean, log_var = jnp.full((1, 2), 0.7), jnp.full((1, 2), -0.4)
    s = jnp.exp(0.5 * log_var)
    z = mean + s * jax.random.normal(key, (400_000, 2))
    log_q = -0.5 * ((z - mean) / s) ** 2 - jnp.log(s)
    sampled = jnp.mean(jnp.sum(log_q + 0.5 * z**2, axis=1))
    np.testing.assert_allclose(losses.gaussian_kl(mean, log_var)[0], sampled, rtol=0.02)


def test_beta_zero_is_zero_and_not_a_default(params, x, key):
    plain, _ = losses.vsae_topk_loss(params, x, key, k=K, beta=0.0)
    _, info = losses.vsae_topk_loss(params, x, key, k=K, beta=0.0)
    np.testing.assert_array_equal(plain, info.squared_error)
    weighted, _ = losses.vsae_topk_loss(params, x, key, k=K, beta=2.0)
    np.testing.assert_allclose(weighted - plain, 2.0 * info.penalties["kl"], rtol=1e-5)


def test_public_losses_are_the_total_loss(params, x, key):
    cases = {
        "topk": losses.topk_loss(params, x, k=K),
        "relu": losses.relu_loss(params, x, l1=0.2),
        "vsae": losses.vsae_loss(params, x, key, beta=0.3, noise_std=0.7),
        "vsae_topk": losses.vsae_topk_loss(
            params, x, key, k=K, beta=0.3, noise_std=0.7
        ),
    }
    for name, (loss, _) in cases.items():
        _, config = make(name, params)
        eps = noise.normal(key, (B, M))
        expected = numpy_loss(params, x, eps, NUMBERS, config)
        np.testing.assert_allclose(loss, expected, rtol=2e-6, err_msg=name)


def test_public_losses_are_jitted_and_keyed(params, x, key):
    for name in ("topk_loss", "relu_loss", "vsae_loss", "vsae_topk_loss"):
        assert hasattr(getattr(losses, name), "lower"), name
        assert inspect.getdoc(getattr(losses, name))
    first, _ = losses.vsae_topk_loss(params, x, key, k=K, beta=0.1)
    again, _ = losses.vsae_topk_loss(params, x, key, k=K, beta=0.1)
    other, _ = losses.vsae_topk_loss(params, x, jax.random.key(8), k=K, beta=0.1)
    assert first == again and first != other


def auxk(params, x, dead, **options):
    residual = x - 1.0
    mu = x @ params["w_enc"]
    return losses.auxk_error(
        residual, mu, params["w_dec"], jnp.asarray(dead), k_aux=3, **options
    )


def test_auxk_is_zero_when_nothing_is_dead(params, x):
    np.testing.assert_array_equal(auxk(params, x, np.zeros(M, bool)), np.zeros(B))
    assert (auxk(params, x, np.ones(M, bool)) > 0).all()


def test_auxk_stops_the_gradient_of_the_residual(params, x):
    def error(residual, mu):
        dead = jnp.ones(M, bool)
        value = losses.auxk_error(residual, mu, params["w_dec"], dead, k_aux=3)
        return jnp.sum(value)

    mu = x @ params["w_enc"]
    residual_gradient, mu_gradient = jax.grad(error, argnums=(0, 1))(x, mu)
    np.testing.assert_array_equal(residual_gradient, np.zeros((B, D)))
    assert (mu_gradient != 0).any()


def test_auxk_has_the_right_sign(params):
    """One dead latent pointing along the residual: more of it lowers the error."""
    w_dec = jnp.zeros((M, D)).at[0, 0].set(1.0)
    residual = jnp.zeros((1, D)).at[0, 0].set(2.0)
    mu = jnp.full((1, M), -1.0).at[0, 0].set(0.5)

    def error(mu):
        dead = jnp.arange(M) == 0
        return losses.auxk_error(residual, mu, w_dec, dead, k_aux=1)[0]

    np.testing.assert_allclose(error(mu), (2.0 - 0.5) ** 2)
    np.testing.assert_allclose(jax.grad(error)(mu)[0, 0], -2 * (2.0 - 0.5))


def test_fired_means_above_zero_not_selected(params):
    """All mu are negative: k are selected, relu makes them 0, none has fired."""
    quiet = params | {"b_enc": jnp.full(M, -100.0)}
    _, info = losses.topk_loss(quiet, jnp.zeros((B, D)), k=K)
    assert not info.fired.any() and info.l0 == 0


def test_bfloat16_is_close_and_float32_accumulated(params, x, key):
    configs = [
        SAEConfig(d_model=D, d_sae=M, k=M, dtype=dtype)
        for dtype in ("float32", "bfloat16")
    ]
    numbers = {"k": M, "beta": 0.3, "noise_std": 0.7}

    def loss(p, config):
        return losses.total_loss(p, x, key, numbers, config=config)[0]

    exact, rounded = (jax.value_and_grad(loss)(params, config) for config in configs)
    np.testing.assert_allclose(rounded[0], exact[0], rtol=0.02)
    for name in params:
        assert rounded[1][name].dtype == jnp.float32
        scale = jnp.abs(exact[1][name]).max()
        np.testing.assert_allclose(
            rounded[1][name] / scale, exact[1][name] / scale, atol=0.03
        )


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype, rtol", [("float32", 1e-6), ("bfloat16", 2e-2)])
def test_the_fast_way_equals_the_plain_one(name, dtype, rtol, key):
    """Custom gradients and counting against autodiff and jax.lax.top_k, at a size where
    every fast path is taken. In bfloat16 the two round sums at other places."""
    rng = np.random.default_rng(5)
    shapes = {"w_enc": (64, 256), "b_enc": 256, "w_dec": (256, 64), "b_dec": 64}
    if CASES[name].get("variance") == "learned":
        shapes |= {"w_var": (64, 256), "b_var": 256}
    if CASES[name].get("gate") == "path":
        shapes |= {"r_mag": 256, "b_mag": 256}
    params = {n: jnp.asarray(rng.normal(size=s) / 8, "f4") for n, s in shapes.items()}
    if CASES[name].get("sparsity") == "jump_relu":
        params["theta"] = jnp.full(256, 0.5)
    x = jnp.asarray(rng.normal(size=(128, 64)), jnp.float32)
    dead = jnp.arange(256) % 3 == 0
    gradients = []
    for top_k in ("lax", "auto"):
        switches = CASES[name] | {"top_k": top_k, "dtype": dtype}
        config = SAEConfig(d_model=64, d_sae=256, k=16, k_aux=8, **switches)
        numbers = NUMBERS | {"k": 16}
        loss = partial(losses.total_loss, config=config)
        value = jax.jit(jax.value_and_grad(loss, has_aux=True))
        gradients.append(value(params, x, key, numbers, dead))
    (plain, plain_info), expected = gradients[0]
    (fast, fast_info), got = gradients[1]
    np.testing.assert_allclose(fast, plain, rtol=rtol)
    np.testing.assert_array_equal(fast_info.fired, plain_info.fired)
    np.testing.assert_allclose(fast_info.l0, plain_info.l0)
    for n, g in expected.items():
        atol = rtol * float(jnp.max(jnp.abs(g)))
        np.testing.assert_allclose(got[n], g, rtol=0, atol=atol, err_msg=n)
