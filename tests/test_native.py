"""The native kernels against XLA's: the same latents, the same gradients, the same bits
from run to run. Skipped where numba is not installed."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_runs import TRAINING, call

from vsae_jax import runs
from vsae_jax.autoencoder import noise, sae
from vsae_jax.config import TrainConfig, resolve_train, sae_config
from vsae_jax.system.errors import UserError
from vsae_jax.training import gradient, groups, native, optimizer, plan, step
from vsae_jax.training.layout import normed

needs_numba = pytest.mark.skipif(
    importlib.util.find_spec("numba") is None, reason="numba is not installed"
)
D, B = 48, 96


def setup(dtype="float32", batch=B, **fields):
    options = {"d_sae": 320, "k": 7, "steps": 40, "batch_size": batch, "lr": 1e-2}
    config = resolve_train(TrainConfig(**options | fields), d_model=D)
    static = sae_config(config, d_model=D, dtype=dtype)
    weights, noise = jax.random.split(jax.random.key(config.seed))
    state = step.init_state(sae.init(weights, static), noise, static)
    bias = 0.1 * jax.random.normal(jax.random.key(5), (static.d_sae,))
    held = normed(state.params, static)
    held |= {"b_enc": bias, "b_dec": jnp.linspace(-0.2, 0.3, D)}
    return config, static, state._replace(params=held)


def rows(batch=B, seed=0):
    x = np.random.default_rng(seed).normal(size=(batch, D)) + 0.3
    return jnp.asarray(x, jnp.float32)


def gradients(by, config, static, state, x, any_dead=False):
    """Of one batch, by one of the two modules."""
    return jax.jit(
        lambda held, x, numbers: by.gradient(
            held,
            x,
            jax.random.key(7),
            numbers,
            dead=jnp.zeros(static.d_sae, bool).at[:9].set(any_dead),
            any_dead=jnp.bool_(any_dead),
            buffers=state.norm,
            config=static,
        )
    )(state.params, x, step.hparams(config))


def assert_near(one, other, tolerance):
    """Gradients and means differ by at most so much of their largest entry."""
    (grads, info), (expected, means) = one, other
    assert grads.keys() == expected.keys()
    assert info.penalties.keys() == means.penalties.keys()
    for name, array in expected.items():
        error = np.abs(grads[name] - array).max() / np.abs(array).max()
        assert error < tolerance, (name, error)
    for name in ("loss", "squared_error", "variance"):
        np.testing.assert_allclose(
            getattr(info, name), getattr(means, name), rtol=tolerance, err_msg=name
        )
    for name, mean in means.penalties.items():
        np.testing.assert_allclose(info.penalties[name], mean, rtol=tolerance)
    np.testing.assert_array_equal(info.l0, means.l0)
    np.testing.assert_array_equal(info.fired, means.fired)


CONFIGS = [
    {"variant": "topk"},
    {"variant": "topk", "subtract_b_dec": False, "decoder_norm": "free"},
    {"variant": "topk", "k": 1, "d_sae": 16},
    {"variant": "topk", "k": 320},
    {"variant": "vsae_topk", "beta": 0.7},
    {"variant": "vsae_topk", "beta": 0.7, "subtract_b_dec": False},
    {"variant": "vsae_topk", "penalty": "none", "k": 64},
]


@needs_numba
@pytest.mark.parametrize("fields", CONFIGS)
@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-5), ("bfloat16", 2e-2)])
def test_gradients_are_those_of_xla(fields, dtype, tolerance):
    config, static, state = setup(dtype, **fields)
    assert_near(
        gradients(native, config, static, state, rows()),
        gradients(gradient, config, static, state, rows()),
        tolerance,
    )


@needs_numba
@pytest.mark.parametrize("d_model, d_sae", [(16, 48), (144, 80), (400, 1040)])
@pytest.mark.parametrize("batch", [1, 33, 130])
def test_shapes_that_fill_no_block(d_model, d_sae, batch, monkeypatch):
    monkeypatch.setattr("test_native.D", d_model)
    config, static, state = setup(batch=batch, d_sae=d_sae, variant="topk", auxk=0.0)
    x = rows(batch)
    assert_near(
        gradients(native, config, static, state, x),
        gradients(gradient, config, static, state, x),
        1e-5,
    )


@needs_numba
def test_batch_in_parts_is_the_batch(monkeypatch):
    config, static, state = setup(batch=256, beta=0.3)
    whole = gradients(native, config, static, state, rows(256))
    monkeypatch.setattr(gradient, "CPU_PART_BYTES", 4 * static.d_sae * 64)
    assert_near(gradients(native, config, static, state, rows(256)), whole, 1e-6)


@needs_numba
@pytest.mark.parametrize("d_model, d_sae", [(16, 16), (144, 80), (48, 1040)])
@pytest.mark.parametrize("clip_norm", [1.0, 1e6])
@pytest.mark.parametrize("decoder_norm", ["unit", "free"])
def test_adam_is_optaxs(d_model, d_sae, clip_norm, decoder_norm, monkeypatch):
    monkeypatch.setattr("test_native.D", d_model)
    fields = {"clip_norm": clip_norm, "decoder_norm": decoder_norm, "d_sae": d_sae}
    config, static, state = setup(variant="topk", auxk=0.0, **fields)
    numbers, rng = step.hparams(config), np.random.default_rng(0)

    @jax.jit
    def by_optax(grads, opt_state, held, at):
        adam = optimizer.of_step(at, numbers, static)
        updates, opt_state = adam.update(grads, opt_state, held)
        return optax.apply_updates(held, updates), opt_state

    @jax.jit
    def by_kernel(grads, opt_state, held, at):
        return native.updated(grads, opt_state, held, at, numbers, config=static)

    held = normed(state.params, static)
    one = other = held, state.opt_state
    for at in range(5):
        grads = {
            name: jnp.asarray(rng.normal(size=array.shape), jnp.float32)
            for name, array in held.items()
        }
        one = by_optax(grads, one[1], one[0], jnp.int32(at))
        other = by_kernel(grads, other[1], other[0], jnp.int32(at))
        assert jax.tree.structure(one) == jax.tree.structure(other)
    changes = (jax.tree.map(jnp.subtract, made[0], held) for made in (one, other))
    for expected, array in zip(*map(jax.tree.leaves, changes), strict=True):
        # Adam divides what rounding leaves of a gradient near 0 by its own size.
        assert np.abs(array - expected).max() < 5e-5 * np.abs(expected).max()
    for expected, array in zip(*map(jax.tree.leaves, (one[1], other[1])), strict=True):
        assert np.abs(array - expected).max() < 1e-5 * np.abs(expected).max()


LATENTS = {
    "random": lambda rng: rng.normal(size=(40, 200)),
    "after a relu": lambda rng: np.maximum(rng.normal(size=(40, 200)), 0),
    "few above 0": lambda rng: np.maximum(rng.normal(size=(40, 200)) - 2, 0),
    "tied": lambda rng: rng.integers(-2, 3, size=(40, 200)),
    "all equal": lambda rng: np.full((40, 200), -1.5),
    "negative": lambda rng: -np.abs(rng.normal(size=(40, 200))),
    "of all sizes": lambda rng: (
        rng.normal(size=(40, 200)) * 10.0 ** rng.integers(-30, 30, size=(40, 200))
    ),
    "signed zeros": lambda rng: rng.choice([-0.0, 0.0, 1e-30], size=(40, 200)),
}


@needs_numba
@pytest.mark.parametrize("kind", LATENTS)
@pytest.mark.parametrize("k", [1, 16, 199, 200])
def test_selection_is_that_of_lax_top_k(kind, k):
    """With more slots than k, as arms of a grid with several k have them."""
    z = jnp.asarray(LATENTS[kind](np.random.default_rng(k)), jnp.float32)
    bias = jnp.linspace(-1, 1, 200) if kind == "random" else jnp.zeros(200)
    numbers, words = (
        jnp.array([k, 0], jnp.int32),
        noise.words(jax.random.key(0), z.shape),
    )
    index, value = native.select(z, bias, numbers, words, jnp.float32(0), k_max=200)
    expected, places = jax.lax.top_k(z + bias[None, :] + 0.0, k)
    order = np.argsort(places, axis=1)
    np.testing.assert_array_equal(
        index[:, :k], np.take_along_axis(np.asarray(places), order, 1)
    )
    np.testing.assert_array_equal(
        value[:, :k], np.take_along_axis(np.asarray(expected), order, 1)
    )
    assert not np.any(value[:, k:])


@needs_numba
def test_noise_is_that_of_xla():
    """Every latent is selected, so that values are all of the noise, tails and all."""
    key, std, (n, m) = jax.random.key(3), jnp.float32(0.7), (512, 4096)
    numbers, words = jnp.array([m, 0], jnp.int32), noise.words(key, (n, m))
    z, bias = jnp.ones((n, m)), jnp.linspace(-1, 1, m)
    index, value = native.select(z, bias, numbers, words, std, k_max=m)
    np.testing.assert_array_equal(index[0], np.arange(m))
    drawn = jax.jit(noise.normal, static_argnums=1)(key, (n, m))
    expected = 1 + bias[None, :] + std * drawn
    np.testing.assert_allclose(value, expected, rtol=1e-6, atol=1e-6)


@needs_numba
def test_auxk_acts_as_by_xla():
    config, static, state = setup(variant="topk", auxk=0.5)
    assert_near(
        gradients(native, config, static, state, rows(), any_dead=True),
        gradients(gradient, config, static, state, rows(), any_dead=True),
        1e-6,
    )


@needs_numba
def test_first_step_that_is_not_finite_is_named():
    config, static, state = setup()
    data = jnp.stack([rows(seed=i) for i in range(5)]).at[3, 2].set(jnp.nan)
    steps = step.compile_steps(static, kernels="native")
    state = steps(state, data, 5, step.hparams(config))
    assert int(state.totals.bad_step) == 3


def trained(arms, data):
    shape = jax.ShapeDtypeStruct(data.shape, data.dtype)
    made = groups.compile_pass(arms, shape, how="loop")
    return groups.states(groups.advance(made.groups, data, len(data)))


def arm(**fields):
    config, static, state = setup(**fields)
    return groups.Arm(static, step.hparams(config), state, "native")


@needs_numba
def test_an_arm_of_a_grid_has_the_bits_of_its_single_run():
    """Twice alone, and with others of other k, beta and seed."""
    data = jnp.stack([rows(seed=i) for i in range(6)])
    fields = [{"k": 5, "seed": 1}, {"k": 9, "beta": 0.4}, {"k": 2, "lr": 1e-3}]
    together = trained([arm(**f) for f in fields], data)
    for place, f in enumerate(fields):
        for alone in (trained([arm(**f)], data)[0], trained([arm(**f)], data)[0]):
            for name, array in alone.params.items():
                np.testing.assert_array_equal(array, together[place].params[name])
            assert alone.totals == together[place].totals


@needs_numba
def test_training_follows_xla():
    data = jnp.stack([rows(seed=i) for i in range(20)])
    ours, xla = (
        trained([arm()._replace(kernels=kernels)], data)[0]
        for kernels in ("native", "xla")
    )
    for name, array in xla.params.items():
        np.testing.assert_allclose(ours.params[name], array, atol=2e-4, err_msg=name)
    loss, expected = (float(s.totals.sums["loss"]) for s in (ours, xla))
    assert loss == pytest.approx(expected, rel=1e-4)


@needs_numba
def test_a_run_says_so_and_resumes_to_the_bit(tiny_rows, tmp_path, capfd):
    flags = {**TRAINING, "activations": tiny_rows, "kernels": "native"}
    flags |= {"variant": "vsae_topk", "steps": 12}
    assert call("train", **flags, out=tmp_path / "whole") == 0
    assert "note: native kernels" in capfd.readouterr().out
    flags |= {"out": tmp_path / "cut", "checkpoint_every": 5}
    assert call("train", **flags) == 0
    (tmp_path / "cut" / runs.PARAMETERS).unlink()
    for late in (tmp_path / "cut" / runs.CHECKPOINTS).glob("1[0-9]"):
        late.rename(tmp_path / f"away_{late.name}")
    assert call("train", **flags) == 0
    whole, cut = (
        (tmp_path / name / runs.PARAMETERS).read_bytes() for name in ("whole", "cut")
    )
    assert whole == cut


@pytest.mark.parametrize(
    "fields, said",
    [
        ({"variant": "relu"}, "sparsity none"),
        ({"variant": "vsae_topk", "variance": "learned"}, "a learned variance"),
        ({"variant": "vsae_topk", "noise_at": "input"}, "noise_at=input"),
        ({"variant": "vsae_topk", "relu": True}, "a relu with noise or a KL"),
        ({"variant": "topk", "selection": "magnitude"}, "selection=magnitude"),
        ({"variant": "vsae_topk", "kl_over": "selected"}, "kl_over=selected"),
        ({"variant": "topk", "prefixes": "1/4"}, "prefixes"),
        ({"variant": "topk", "d_sae": 90}, "multiples of 16"),
    ],
)
@needs_numba
def test_what_the_kernels_do_not_know_is_xlas_and_said(fields, said):
    config, static, _ = setup(**fields)
    made = native.choice("native", static, batch_size=B, together=False)
    assert made.kernels == "xla" and said in made.note
    auto = native.choice("auto", static, batch_size=2**20, together=False)
    assert auto == native.Choice("xla", "")


@needs_numba
def test_auto_takes_them_where_few_latents_are_kept():
    _, few, _ = setup(variant="topk", d_sae=2048, k=64)
    _, many, _ = setup(variant="topk", d_sae=2048, k=1024)
    options = {"batch_size": 1024, "together": False}
    assert native.choice("auto", few, **options).kernels == "native"
    assert native.choice("auto", many, **options).kernels == "xla"
    assert native.choice("auto", few, batch_size=8, together=False).kernels == "xla"
    assert native.choice("auto", few, batch_size=1024, together=True).kernels == "xla"


@needs_numba
def test_kernels_that_cannot_be_loaded_are_left_to_xla(monkeypatch):
    def load():
        raise RuntimeError("API version\n0.9")

    monkeypatch.setattr(native, "load", load)
    _, few, _ = setup(variant="topk", d_sae=2048, k=64)
    options = {"batch_size": 1024, "together": False}
    made = native.choice("auto", few, **options)
    assert made.kernels == "xla" and "API version 0.9" in made.note
    with pytest.raises(UserError, match="--kernels=native.*API version 0.9"):
        native.choice("native", few, **options)


def test_without_numba_native_is_refused_and_auto_is_xla(monkeypatch, tiny_rows):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    options = {"activations": str(tiny_rows), "d_sae": 2048, "k": 4}
    asked = TrainConfig(**options, batch_size=1024, kernels="auto")
    assert plan.plan(asked).kernels == native.Choice("xla", "")
    with pytest.raises(UserError, match="--kernels=native.*pip install"):
        plan.plan(TrainConfig(**options, kernels="native"))
