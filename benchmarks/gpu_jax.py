"""Our step, a grid of it and the products that bound it, for `benchmarks.gpu`."""

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.gpu_cases import Case, answer_all
from benchmarks.ours import Product, first_state, resolved
from vsae_jax.training.step import Numbers, compile_steps, hparams

DISPATCH = 10


def measure(case: Case) -> dict[str, float]:
    """Milliseconds a step (of all arms; of the five products for `matmul`) and seconds
    of the first call, which compiles."""
    run, per_call = _products(case) if case.kind == "matmul" else _training(case)
    first_seconds = _seconds(run, 1)
    count = max(round(case.seconds / _seconds(run, 1)), 1)
    ms = [1e3 * _seconds(run, count) / count / per_call for _ in range(case.rounds)]
    return {
        "ms": sorted(ms)[len(ms) // 2],
        "low_ms": min(ms),
        "high_ms": max(ms),
        "first_seconds": first_seconds,
    }


def _seconds(run: Callable[[], Any], count: int) -> float:
    start = time.perf_counter()
    for _ in range(count):
        result = run()
    jax.block_until_ready(result)
    return time.perf_counter() - start


def _training(case: Case) -> tuple[Callable[[], Any], int]:
    config, static = resolved(
        case.variant,
        case.mode,
        d_model=case.d_model,
        d_sae=case.d_sae,
        k=case.k,
        batch=case.batch,
    )
    key = jax.random.key(0)
    shape = (DISPATCH, case.batch, case.d_model)
    rows = jax.random.normal(key, shape, jnp.bfloat16)
    scale = float(config.input_scale) / case.d_model**0.5
    if case.kind == "grid":
        keys = jax.random.split(key, case.arms)
        state = jax.vmap(lambda k: first_state(k, static, scale=scale))(keys)
        numbers = _arms(hparams(config), case.arms)
        steps = compile_steps(static, arms=case.arms)
    else:
        state = first_state(key, static, scale=scale)
        numbers, steps = hparams(config), compile_steps(static)

    def run() -> Any:
        nonlocal state
        state = steps(state, rows, DISPATCH, numbers)
        return state

    return run, DISPATCH


def _arms(numbers: Numbers, arms: int) -> Numbers:
    """The numbers of arms that differ in k, below the static one, and in beta."""
    many = jax.tree.map(lambda value: jnp.repeat(value[None], arms, axis=0), numbers)
    odd = jnp.arange(arms) % 2
    return many | {
        "k": jnp.where(odd, jnp.maximum(many["k"] // 2, 1), many["k"]),
        "beta": many["beta"] * (1 + jnp.arange(arms) // 2),
    }


def _products(case: Case) -> tuple[Callable[[], Any], int]:
    """The five products of a dense step: x w_enc, f w_dec, e w_dec', f' e, x' g."""
    sizes = {"b": case.batch, "d": case.d_model, "m": case.d_sae}
    forms = ("bdm", "bmd", "bdm", "mbd", "dbm")
    products = [Product(form, sizes, case.mode) for form in forms]

    def run() -> Any:
        return [product() for product in products]

    return run, 1


if __name__ == "__main__":
    versions = {"jax": jax.__version__, "device": jax.devices()[0].device_kind}
    answer_all(measure, versions=versions, errors=(jax.errors.JaxRuntimeError,))
