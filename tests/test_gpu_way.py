"""The way of a GPU against the way of a CPU: the same gradient and the same bits again.

Where JAX has a GPU its way runs there, against a CPU; elsewhere both run on the CPU, in
float32 alone.
"""

from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vsae_jax.autoencoder import sae
from vsae_jax.autoencoder.sparsity import compiler_options
from vsae_jax.config import TrainConfig, resolve_train, sae_config
from vsae_jax.training import gradient, layout, step

# JAX says that it means to leave the kernel's way to a GPU for another one.
pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend")

needs_gpu = pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU")
DTYPES = ["float32", pytest.param("bfloat16", marks=needs_gpu)]
D, M, B = 64, 256, 128
VARIANTS = {
    "topk": {},
    "topk with auxk": {"variant": "topk", "auxk": 0.5, "dead_after_tokens": 1},
    "topk by the kernel": {"variant": "topk", "top_k": "kernel"},
    "vsae_topk": {},
    "vsae_topk, learned variance": {"variant": "vsae_topk", "variance": "learned"},
    "vsae": {},
    "batch_topk": {},
    "jump_relu": {},
    "gated": {},
    "matryoshka": {"prefixes": "1:64:128"},
}
# Sums in another order; of bfloat16 operands a result may then round the other way.
CLOSE = {"float32": 1e-5, "bfloat16": 5e-3}


def setup(name, dtype):
    options = {"variant": name, "d_sae": M, "k": 8, "batch_size": B} | VARIANTS[name]
    config = resolve_train(TrainConfig(**options), d_model=D)
    static = sae_config(config, d_model=D, dtype=dtype)
    weights, noise = jax.random.split(jax.random.key(3))
    state = step.init_state(sae.init(weights, static, scale=0.1), noise, static)
    return static, state, step.hparams(config)


def gradients(name, dtype, backend, device):
    """The gradient of one batch and what it says of it, in a backend's way."""
    with mock.patch.object(jax, "default_backend", lambda: device.platform):
        options = compiler_options()  # of what compiles it, whichever way it goes
    with (
        mock.patch.object(jax, "default_backend", lambda: backend),
        jax.default_device(device),
    ):
        static, state, numbers = setup(name, dtype)
        dead = jnp.arange(M) % 2 == 0
        x = np.random.default_rng(0).normal(size=(B, D)).astype(np.float32)

        def of(held, x, key):
            return gradient.gradient(
                held,
                x,
                key,
                numbers,
                dead=dead,
                any_dead=jnp.any(dead),
                buffers=state.norm,
                config=static,
            )

        held = layout.normed(state.params, static)
        run = jax.jit(of, compiler_options=options)
        return jax.device_get(run(held, jnp.asarray(x), jax.random.key(5)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", VARIANTS)
def test_the_gradient_is_that_of_a_cpu(name, dtype):
    cpu = gradients(name, dtype, "cpu", jax.devices("cpu")[0])
    gpu = gradients(name, dtype, "gpu", jax.devices()[0])
    (expected, info), (got, other) = cpu, gpu
    assert got.keys() == expected.keys()
    for array, value in expected.items():
        atol = CLOSE[dtype] * np.abs(value).max()
        np.testing.assert_allclose(got[array], value, rtol=0, atol=atol, err_msg=array)
    assert other.l0 == info.l0
    np.testing.assert_array_equal(other.fired, info.fired)
    np.testing.assert_allclose(other.loss, info.loss, rtol=CLOSE[dtype] / 10)


@needs_gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["topk", "topk by the kernel", "vsae_topk"])
def test_the_same_steps_give_the_same_bits(name, dtype):
    x = jax.random.normal(jax.random.key(1), (20, B, D))
    ends = []
    for _ in range(2):
        static, state, numbers = setup(name, dtype)
        ends.append(jax.device_get(step.compile_steps(static)(state, x, 20, numbers)))
    assert int(ends[0].totals.bad_step) == -1
    for array, value in ends[0].params.items():
        np.testing.assert_array_equal(ends[1].params[array], value, err_msg=array)
