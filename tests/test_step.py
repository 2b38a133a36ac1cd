"""One step and many: traces, keys, counters, and a golden step."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vsae_jax.autoencoder import noise, sae
from vsae_jax.config import TrainConfig, resolve_train, sae_config
from vsae_jax.training import gradient, step

D, B = 8, 16


def setup(**fields):
    options = {"d_sae": 24, "k": 4, "steps": 40, "batch_size": B, "lr": 1e-2} | fields
    config = resolve_train(TrainConfig(**options), d_model=D)
    static = sae_config(config, d_model=D, dtype="float32")
    weights, noise = jax.random.split(jax.random.key(config.seed))
    state = step.init_state(sae.init(weights, static), noise, static)
    return config, static, state


def rows(n, seed=0):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.normal(size=(n, B, D)), jnp.float32)


def params_of(state):
    params = {name: np.asarray(a) for name, a in state.params.items()}
    return {**params, "w_dec": params["w_dec_t"].T}


@pytest.mark.parametrize("variant", ["relu", "topk", "vsae", "vsae_topk"])
def test_training_lowers_the_loss_of_every_variant(variant):
    config, static, state = setup(variant=variant, beta=0.0, l1=0.0)
    steps = step.compile_steps(static)
    # A few directions only, so that there is something to learn.
    basis = np.random.default_rng(5).normal(size=(3, D))
    codes = np.random.default_rng(6).normal(size=(40, B, 3)) * 30
    data = jnp.asarray(codes @ basis, jnp.float32)
    state = steps(state, data[:10], 10, step.hparams(config))
    early = float(state.totals.sums["squared_error"])
    state = state._replace(totals=step.zero_totals(state.totals.sums))
    for i in (10, 20):
        state = steps(state, data[i : i + 10], 10, step.hparams(config))
    assert float(state.totals.sums["squared_error"]) / 20 < 0.5 * early / 10
    assert int(state.totals.bad_step) == -1 and int(state.step) == 30


@pytest.fixture
def traces(monkeypatch) -> list:
    """Grows whenever the step is traced, for a config that no other test has: what was
    traced before stays known."""
    found, train_step = [], step.train_step

    def counted(*args, **options):
        found.append(args)
        return train_step(*args, **options)

    monkeypatch.setattr(step, "train_step", counted)
    return found


def test_chunks_of_any_length_are_one_trace_and_the_same_bits(traces):
    config, static, whole = setup(d_sae=25)
    data, numbers = rows(6), step.hparams(config)
    steps = step.compile_steps(static)
    whole = steps(whole, data, 6, numbers)
    once = len(traces)
    assert once > 0
    _, _, cut = setup(d_sae=25)
    for start, stop in ((0, 1), (1, 4), (4, 6)):
        unused = jnp.full((6 - stop + start, B, D), jnp.nan)
        part = jnp.concatenate([data[start:stop], unused])
        cut = steps(cut, part, stop - start, numbers)
    assert len(traces) == once
    for name, array in params_of(whole).items():
        np.testing.assert_array_equal(array, params_of(cut)[name])
    assert whole.totals == cut.totals


def test_changing_a_number_does_not_recompile(traces):
    config, static, state = setup(d_sae=26)
    steps = step.compile_steps(static)
    numbers = step.hparams(config)
    state = steps(state, rows(2), 2, numbers)
    once = len(traces)
    assert once > 0
    other = numbers | {
        "k": jnp.int32(2),
        "beta": jnp.float32(0.7),
        "lr": jnp.float32(1e-3),
    }
    state = steps(state, rows(2), 2, other)
    assert len(traces) == once
    assert float(state.totals.sums["l0"]) == 2 * 4 + 2 * 2


def test_noise_is_a_function_of_seed_and_step_only():
    config, static, state = setup()
    numbers = step.hparams(config)
    x = rows(1)[0]
    train = jax.jit(partial(step.train_step, config=static))
    first, _ = train(state, x, numbers)
    again, _ = train(state, x, numbers)
    np.testing.assert_array_equal(first.params["w_enc"], again.params["w_enc"])
    later = state._replace(step=jnp.int32(1))
    _, noise_of_1 = train(later, x, numbers)
    _, noise_of_0 = train(state, x, numbers)
    assert noise_of_0.squared_error != noise_of_1.squared_error


@pytest.mark.parametrize("variant, draws", [("topk", False), ("vsae_topk", True)])
def test_a_lone_topk_run_draws_no_noise(variant, draws, monkeypatch):
    drawn, normal = [], noise.normal

    def counted(*args, **options):
        drawn.append(args)
        return normal(*args, **options)

    monkeypatch.setattr(noise, "normal", counted)
    config, static, state = setup(variant=variant)
    jax.eval_shape(
        partial(step.train_step, config=static), state, rows(1)[0], step.hparams(config)
    )
    assert bool(drawn) == draws


def test_silence_is_counted_in_rows_and_ends_with_a_value_above_zero():
    config, static, state = setup(variant="topk", lr=1e-6)
    b_enc = jnp.full(24, -1e3).at[jnp.arange(2)].set(1e3)
    state = state._replace(params=state.params | {"b_enc": b_enc})
    state = step.compile_steps(static)(state, rows(3), 3, step.hparams(config))
    silent = np.asarray(state.rows_since_fired)
    np.testing.assert_array_equal(silent[:2], [0, 0])
    np.testing.assert_array_equal(silent[2:], np.full(22, 3 * B))


def test_auxk_trains_the_dead_latents_and_nothing_else_does():
    """The first twelve latents win every selection; the others are dead."""

    def train(auxk):
        config, static, state = setup(
            variant="topk", auxk=auxk, dead_after_tokens=B, lr=1e-2, steps=200
        )
        b_enc = jnp.zeros(24).at[:12].set(200.0)
        state = state._replace(params=state.params | {"b_enc": b_enc})
        steps, errors = step.compile_steps(static), []
        before = params_of(state)
        for i in range(4):
            state = steps(state, 10 * rows(50, seed=i), 50, step.hparams(config))
            errors.append(float(state.totals.sums.get("auxk", 0.0)))
            state = state._replace(totals=step.zero_totals(state.totals.sums))
        return before, params_of(state), errors

    before, after, _ = train(0.0)
    np.testing.assert_array_equal(after["b_enc"][12:], before["b_enc"][12:])
    np.testing.assert_array_equal(after["w_enc"][:, 12:], before["w_enc"][:, 12:])
    before, after, errors = train(1.0)
    assert (after["w_enc"][:, 12:] != before["w_enc"][:, 12:]).all()
    assert (after["w_dec"][12:] != before["w_dec"][12:]).all()
    assert errors[-1] < 0.8 * errors[0]


def test_first_step_that_is_not_finite_is_named():
    config, static, state = setup()
    data = rows(5).at[3].set(jnp.nan)
    state = step.compile_steps(static)(state, data, 5, step.hparams(config))
    assert int(state.totals.bad_step) == 3


def test_golden_step():
    """What three steps give. Legitimate reasons to change these numbers: a change of
    the loss, the optimizer, the initial weights or the noise that is meant, and is
    written into docs/decisions. Made by printing `got` below."""
    config, static, state = setup(seed=3)
    state = step.compile_steps(static)(state, rows(3), 3, step.hparams(config))
    got = {
        "loss": float(state.totals.sums["loss"]),
        "kl": float(state.totals.sums["kl"]),
        "w_enc": float(jnp.sum(jnp.abs(state.params["w_enc"]))),
        "b_dec": float(jnp.sum(jnp.abs(state.params["b_dec"]))),
    }
    assert got == pytest.approx(GOLDEN, rel=2e-5)


GOLDEN = {"loss": 43.283398, "kl": 38.302402, "w_enc": 53.505894, "b_dec": 0.13009179}


@pytest.mark.parametrize(
    ("n", "d_sae", "rows"),
    [(1024, 2048, 1024), (1024, 2304, 1024), (1024, 9216, 512), (7, 2**23, 1)],
)
def test_a_part_is_the_largest_that_fits_and_divides_the_batch(n, d_sae, rows):
    assert gradient.rows_of_a_part(n, d_sae) == rows


@pytest.mark.parametrize("switches", [{}, {"variant": "topk", "auxk": 0.5}])
def test_a_batch_in_parts_is_the_batch(switches, monkeypatch):
    """512 rows in parts of 128, against all at once: the sums differ in their order."""
    config, static, state = setup(seed=1, dead_after_tokens=64, **switches)
    data = jnp.concatenate([rows(512 // B, seed=4).reshape(1, 512, -1)] * 2)
    taken = []
    for part_bytes in (4 * static.d_sae * 128, 2**25):
        monkeypatch.setattr(gradient, "CPU_PART_BYTES", part_bytes)
        jax.clear_caches()  # or the second would be the first's program
        start = jax.tree.map(jnp.array, state)
        done = step.compile_steps(static)(start, data, 2, step.hparams(config))
        taken.append((params_of(done), jax.device_get(done.totals)))
    (parts, totals), (whole, expected) = taken
    for name, array in whole.items():
        np.testing.assert_allclose(parts[name], array, rtol=0, atol=2e-6, err_msg=name)
    for name, total in expected.sums.items():
        np.testing.assert_allclose(totals.sums[name], total, rtol=1e-5, err_msg=name)


PROGRAM = """
import hashlib, jax
from test_step import B, D, rows, setup
from vsae_jax.training import step
config, static, state = setup(auxk=0.5, dead_after_tokens=B)
lowered = step.compile_steps(static).lower(state, rows(2), 2, step.hparams(config))
print(hashlib.sha256(lowered.as_text().encode()).hexdigest())
"""


def test_every_interpreter_compiles_the_same_program():
    """Two penalties: the order of a set of their names depends on the hash seed, and
    processes of one run must not compile different programs."""
    tests = Path(__file__).parent
    path = os.pathsep.join([str(tests.parent), str(tests)])
    programs = {
        subprocess.run(
            [sys.executable, "-c", PROGRAM],
            env=os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": path},
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for seed in ("0", "1", "2")
    }
    assert len(programs) == 1 and len(programs.pop()) == 65


SHAPES = [(8, 24, 16), (48, 40, 33), (64, 256, 128)]
VARIANTS = [
    {"variant": "relu"},
    {"variant": "vsae"},
    {"variant": "topk", "auxk": 0.5, "dead_after_tokens": 1},
    {"variant": "vsae_topk", "variance": "learned"},
    {"variant": "vsae_topk", "decoder_norm": "free", "subtract_b_dec": False},
    {"variant": "batch_topk", "auxk": 0.5, "dead_after_tokens": 1},
    {"variant": "vsae_batch_topk", "variance": "learned"},
    {"variant": "jump_relu"},
    {"variant": "vsae_jump_relu", "target_l0": 0.0},
    {"variant": "gated"},
    {"variant": "matryoshka", "prefixes": "1:5:9"},
    {"variant": "vaease"},
]


# Each variant in one shape and each shape with four variants; the rest is slow.
@pytest.mark.parametrize(
    "shape, switches",
    [
        pytest.param(
            shape, switches, marks=() if i % len(SHAPES) == j else pytest.mark.slow
        )
        for i, switches in enumerate(VARIANTS)
        for j, shape in enumerate(SHAPES)
    ],
)
def test_every_shape_trains_in_bfloat16(shape, switches):
    """XLA on a CPU has products of bfloat16 that it compiles and cannot run."""
    d_model, d_sae, batch = shape
    options = {"d_sae": d_sae, "k": 4, "steps": 3, "batch_size": batch} | switches
    config = resolve_train(TrainConfig(**options), d_model=d_model)
    static = sae_config(config, d_model=d_model, dtype="bfloat16")
    weights, noise = jax.random.split(jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (3, batch, d_model))
    done = step.compile_steps(static)(
        step.init_state(sae.init(weights, static), noise, static),
        x,
        3,
        step.hparams(config),
    )
    assert int(done.totals.steps) == 3 and int(done.totals.bad_step) == -1
