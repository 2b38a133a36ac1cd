"""Schedules at their corners, and the unit-norm decoder against plain Adam."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vsae_jax.config import SAEConfig
from vsae_jax.training import layout, optimizer

UNIT = SAEConfig(d_model=5, d_sae=12, k=4)


def rate(step, **changes):
    options = {"peak": 2.0, "warmup": 10, "decay_start": 80, "steps": 100} | changes
    return float(optimizer.learning_rate(step, **options))


@pytest.mark.parametrize(
    ("step", "expected"),
    [(0, 0.2), (4, 1.0), (9, 2.0), (50, 2.0), (80, 2.0), (90, 1.0), (99, 0.1)],
)
def test_learning_rate(step, expected):
    assert rate(step) == pytest.approx(expected)


def test_learning_rate_without_warmup_or_decay():
    assert rate(0, warmup=0) == 2.0
    assert rate(99, decay_start=100) == 2.0


@pytest.mark.parametrize(
    ("step", "expected"), [(0, 0.0), (5, 0.15), (10, 0.3), (99, 0.3)]
)
def test_kl_weight_rises_linearly(step, expected):
    assert float(optimizer.kl_weight(step, beta=0.3, warmup=10)) == pytest.approx(
        expected
    )


def test_kl_weight_without_warmup_is_beta_at_once():
    assert float(optimizer.kl_weight(0, beta=0.3, warmup=0)) == pytest.approx(0.3)


@pytest.fixture
def params():
    w = jax.random.normal(jax.random.key(0), (5, 12))
    w = w / jnp.linalg.norm(w, axis=0, keepdims=True)
    return {layout.DECODER: w, "b_dec": jnp.ones(5)}


@pytest.fixture
def gradient():
    keys = jax.random.split(jax.random.key(1))
    return {
        layout.DECODER: jax.random.normal(keys[0], (5, 12)),
        "b_dec": jax.random.normal(keys[1], (5,)),
    }


def test_free_decoder_is_clipped_adam(params, gradient):
    ours = optimizer.adam(learning_rate=0.1, clip_norm=0.5, unit_norm_decoder=False)
    theirs = optax.chain(optax.clip_by_global_norm(0.5), optax.adam(0.1))
    updates, _ = ours.update(gradient, ours.init(params), params)
    expected, _ = theirs.update(gradient, theirs.init(params), params)
    for name in params:
        np.testing.assert_allclose(updates[name], expected[name], rtol=1e-6)


def test_unit_norm_decoder_stays_on_the_sphere(params, gradient):
    transform = optimizer.adam(learning_rate=0.1, unit_norm_decoder=True)
    state = transform.init(params)
    for _ in range(5):
        updates, state = transform.update(gradient, state, params)
        params = layout.normed(optax.apply_updates(params, updates), UNIT)
    norms = jnp.linalg.norm(params[layout.DECODER], axis=0)
    np.testing.assert_allclose(norms, np.ones(12), rtol=1e-6)
    assert (params["b_dec"] != 1).all()


def test_gradient_along_a_row_is_removed(params):
    along = {layout.DECODER: 3.0 * params[layout.DECODER], "b_dec": jnp.zeros(5)}
    link = optimizer.tangent_decoder_gradient()
    updates, _ = link.update(along, link.init(params), params)
    np.testing.assert_allclose(updates[layout.DECODER], np.zeros((5, 12)), atol=1e-6)


def test_adam_moments_are_float32(params):
    state = optimizer.adam().init(params)
    moments = [a.dtype for a in jax.tree.leaves(state) if a.ndim]
    assert moments and set(moments) == {jnp.dtype("float32")}
