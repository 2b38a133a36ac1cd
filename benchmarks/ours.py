"""Our step, and the matrix products that bound it, as workers."""

import time
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from benchmarks.turns import Steps, Task, serve
from vsae_jax import sae
from vsae_jax.config import TrainConfig, resolve_train, sae_config
from vsae_jax.step import compile_steps, hparams, init_state

VARIANTS = ("topk", "vsae_topk")
MATMUL = "matmul"
# As the peers count it: no latent dies within a benchmark.
NEVER_DEAD = 10_000_000


def make(task: Task) -> tuple[Steps, dict[str, str]]:
    """The steps of `vsae_jax_<variant>` under the paper's preset, or of `matmul`."""
    steps = _matmuls(task) if task.implementation == MATMUL else _training(task)
    return steps, {"jax": jax.__version__}


def _training(task: Task) -> Steps:
    rows = np.load(task.rows, mmap_mode="r")
    config = resolve_train(
        TrainConfig(
            variant=task.implementation.removeprefix("vsae_jax_"),  # pyright: ignore[reportArgumentType]
            k=task.k,
            d_sae=task.d_sae,
            batch_size=task.batch,
            dead_after_tokens=NEVER_DEAD,
        ),
        d_model=rows.shape[-1],
    )
    static = sae_config(config, d_model=rows.shape[-1], dtype=task.mode)  # pyright: ignore[reportArgumentType]
    key, noise_key = jax.random.split(jax.random.key(0))
    norm = float(np.sqrt(np.square(rows[0]).sum(-1).mean()))
    scale = float(config.input_scale) / norm
    state = init_state(sae.init(key, static, scale=scale), noise_key, static)
    numbers = hparams(config)
    # As the trainer hands them over: bfloat16, on the device before they are needed.
    count = min(task.dispatch, len(rows))
    device_rows = jnp.asarray(rows[:count].astype(ml_dtypes.bfloat16))
    run = compile_steps(static)

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
    """The dense step's products, x w_enc, f w_dec and e' f, one after the other.

    Together they have every shape of the five in a step of 10 B d m FLOP. What comes
    out goes into a buffer that is there already, so that no page is touched anew.
    """
    d_model = np.load(task.rows, mmap_mode="r").shape[-1]
    sizes = {"b": task.batch, "d": d_model, "m": task.d_sae}
    flop = 2.0 * task.batch * d_model * task.d_sae
    products = [_Product(form, sizes, task.mode) for form in ("bdm", "bmd", "dbm")]

    def steps(n: int) -> float:
        best = 0.0
        for product in products:
            start = time.perf_counter()
            for _ in range(n):
                product()
            product.wait()
            best = max(best, n * flop / (time.perf_counter() - start))
        return best

    return steps


class _Product:
    """`[i, j] @ [j, o] -> [i, o]`, float32 from operands of the mode's dtype."""

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

    def __call__(self) -> None:
        self._out = self._run(self._a, self._b, self._out)

    def wait(self) -> None:
        jax.block_until_ready(self._out)


if __name__ == "__main__":
    serve(make)
