"""Our step, and the matrix products that bound it, as workers."""

import time
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jaxtyping import Array, Key

from benchmarks.turns import Steps, Task, serve
from vsae_jax.autoencoder import sae
from vsae_jax.config import SAEConfig, TrainConfig, resolve_train, sae_config
from vsae_jax.training.step import TrainState, compile_steps, hparams, init_state

MATMUL = "matmul"
# As the peers count it: no latent dies within a benchmark.
NEVER_DEAD = 10_000_000


def make(task: Task) -> tuple[Steps, dict[str, str]]:
    """The steps of `vsae_jax_<variant>` or `vsae_jax_native_<variant>` under the
    paper's preset, or of `matmul`."""
    steps = _matmuls(task) if task.implementation == MATMUL else _training(task)
    return steps, {"jax": jax.__version__}


def resolved(
    variant: Any,
    mode: Any,
    *,
    d_model: int,
    d_sae: int,
    k: int,
    batch: int,
    top_k: Any = "auto",
) -> tuple[TrainConfig, SAEConfig]:
    """The paper's preset at these sizes; products have operands of the mode's dtype."""
    config = resolve_train(
        TrainConfig(
            variant=variant,
            k=k,
            d_sae=d_sae,
            batch_size=batch,
            dead_after_tokens=NEVER_DEAD,
            top_k=top_k,
        ),
        d_model=d_model,
    )
    return config, sae_config(config, d_model=d_model, dtype=mode)


def first_state(
    key: Key[Array, ""], static: SAEConfig, *, scale: float | Array
) -> TrainState:
    """Weights and noise of one key."""
    weights_key, noise_key = jax.random.split(key)
    variables = sae.init(weights_key, static, scale=scale)  # pyright: ignore[reportArgumentType]
    return init_state(variables, noise_key, static)


def _training(task: Task) -> Steps:
    rows = np.load(task.rows, mmap_mode="r")
    variant = task.implementation.removeprefix("vsae_jax_")
    kernels = "native" if variant.startswith("native_") else "xla"
    config, static = resolved(
        variant.removeprefix("native_"),
        task.mode,
        d_model=rows.shape[-1],
        d_sae=task.d_sae,
        k=task.k,
        batch=task.batch,
    )
    norm = float(np.sqrt(np.square(rows[0]).sum(-1).mean()))
    scale = float(config.input_scale) / norm
    state = first_state(jax.random.key(0), static, scale=scale)
    numbers = hparams(config)
    # As the trainer hands them over: bfloat16, on the device before they are needed.
    count = min(task.dispatch, len(rows))
    device_rows = jnp.asarray(rows[:count].astype(ml_dtypes.bfloat16))
    run = compile_steps(static, kernels=kernels)

    def steps(n: int) -> float:
        nonlocal state
        while n > 0:
            now = min(n, count)
            state = run(state, device_rows, now, numbers)
            n -= now
        jax.block_until_ready(state)
        return 0.0

    return steps


def _matmuls(task: Task) -> Steps:
    """The dense step's products, one after the other; the best rate of them.

    x w_enc, f w_dec and x' g have every shape of the five in a step of 10 B d m FLOP.
    Results go into memory that is there already, so that no page is touched anew.
    """
    d_model = np.load(task.rows, mmap_mode="r").shape[-1]
    sizes = {"b": task.batch, "d": d_model, "m": task.d_sae}
    flop = 2.0 * task.batch * d_model * task.d_sae
    products = [Product(form, sizes, task.mode) for form in ("bdm", "bmd", "dbm")]

    def steps(n: int) -> float:
        best = 0.0
        for product in products:
            start = time.perf_counter()
            for _ in range(n):
                result = product()
            jax.block_until_ready(result)
            best = max(best, n * flop / (time.perf_counter() - start))
        return best

    return steps


class Product:
    """One of the dense step's products over and over, into memory that it has:
    `[i, j] @ [j, o] -> [i, o]`, float32 from operands of the mode's dtype."""

    def __init__(self, form: str, sizes: dict[str, int], mode: str):
        a_key, b_key = jax.random.split(jax.random.key(0))
        i, j, o = (sizes[name] for name in form)
        shapes = (i, j), (j, o), (i, o)
        self._a: Any = jax.random.normal(a_key, shapes[0]).astype(mode)
        self._b: Any = jax.random.normal(b_key, shapes[1]).astype(mode)
        self._out = jnp.zeros(shapes[2])

        def product(a, b, out):
            del out  # its memory is the result's
            return jnp.matmul(a, b, preferred_element_type=jnp.float32)

        self._run = jax.jit(product, donate_argnums=2, keep_unused=True)

    def __call__(self) -> Array:
        """Starts it. The result is valid until the next call."""
        self._out = self._run(self._a, self._b, self._out)
        return self._out


if __name__ == "__main__":
    serve(make)
