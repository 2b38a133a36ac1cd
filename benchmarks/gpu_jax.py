"""Our step, a grid of it, its selection and the device's limits, for `benchmarks.gpu`.

All programs are compiled first, several at a time: the device is not timed meanwhile.
"""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from benchmarks.gpu_cases import Case, answer_all
from benchmarks.ours import first_state, resolved
from vsae_jax.autoencoder.sparsity import compiler_options, keep_top_k
from vsae_jax.config import SAEConfig
from vsae_jax.training.step import (
    Numbers,
    TrainState,
    compile_steps,
    hparams,
    train_step,
)

DISPATCH = 10
# Batches that a selection is timed on, so that none is in the cache.
BATCHES = 4
COMPILE_AT_ONCE = 8
IN_GRAPHS = "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,DYNAMIC_SLICE_FUSION,WHILE,CONDITIONAL"

_programs: dict[Case, Future] = {}


def prepare(cases: list[Case], seconds: float) -> dict[str, Any]:
    """Versions and limits. Compiles the cases' programs, as far as two thirds of the
    seconds allow."""
    limits = measure_limits(quick=cases[0].platform == "cpu")
    pool = ThreadPoolExecutor(COMPILE_AT_ONCE)
    start = time.monotonic()
    for case in cases:
        _programs[case] = pool.submit(_compiled, case)
    wait(_programs.values(), timeout=seconds * 2 / 3)
    pool.shutdown(cancel_futures=True)  # waits for those that have begun
    return {
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
        "compiling, s": time.monotonic() - start,
        **limits,
    }


def measure(case: Case) -> dict[str, float]:
    """Milliseconds a step (of all arms) or a selection, bytes that the program holds at
    once, and seconds to compile it, beside others."""
    if _programs[case].cancelled():
        raise TimeoutError("not compiled in time")
    start, work, per_call, seconds = _programs[case].result()
    state = start(jax.random.key(0))

    def run() -> Any:
        nonlocal state
        state = work(state)
        return state

    _seconds(run, 2)
    count = max(round(case.seconds / _seconds(run, 1)), 1)
    ms = [1e3 * _seconds(run, count) / count / per_call for _ in range(case.rounds)]
    return {
        "ms": sorted(ms)[len(ms) // 2],
        "low_ms": min(ms),
        "high_ms": max(ms),
        "first_seconds": seconds,
        "peak_bytes": work.peak_bytes(),
    }


def measure_limits(*, quick: bool) -> dict[str, float]:
    """Bytes a second of a large copy, read and written, and bfloat16 operations a
    second of a large product: both on random numbers."""
    key, size = jax.random.key(1), 512 if quick else 8192
    a = jax.random.normal(key, (size, size), jnp.bfloat16)
    product = jax.jit(lambda a: jnp.matmul(a, a, preferred_element_type=jnp.float32))
    rows = jax.random.normal(key, (4 * size, 2 * size))
    copy = jax.jit(lambda rows: rows + 1)
    best = {}
    for name, run in (("product", lambda: product(a)), ("copy", lambda: copy(rows))):
        _seconds(run, 3)
        best[name] = min(_seconds(run, 10) / 10 for _ in range(3))
    return {
        "copy_bytes_per_second": 2 * rows.nbytes / best["copy"],
        "bfloat16_flop_per_second": 2 * size**3 / best["product"],
    }


def _seconds(run: Callable[[], Any], count: int) -> float:
    start = time.perf_counter()
    for _ in range(count):
        result = run()
    jax.block_until_ready(result)
    return time.perf_counter() - start


class _Work:
    """`state -> state` by a compiled program; of several states in turns."""

    def __init__(self, program: Any, arguments: tuple[Any, ...], turns: bool = False):
        self._program, self._arguments, self._turns = program, arguments, turns

    def in_turns(self) -> "_Work":
        return _Work(self._program, self._arguments, True)

    def peak_bytes(self) -> int:
        m = self._program.memory_analysis()
        taken = m.argument_size_in_bytes + m.output_size_in_bytes
        return taken + m.temp_size_in_bytes - m.alias_size_in_bytes

    def __call__(self, state: Any) -> Any:
        if self._turns:
            return [self._program(one, *self._arguments) for one in state]
        return self._program(state, *self._arguments)


def _compiled(case: Case) -> tuple[Callable[[Any], Any], _Work, int, float]:
    """What makes a state from a key, what works on it, the steps or selections in one
    call of that, and the seconds to compile it."""
    if case.kind == "turns":
        make, work, per_call, seconds = _programs[single(case)].result()
        keys = jax.random.split(jax.random.key(0), case.arms)
        return lambda _: [make(key) for key in keys], work.in_turns(), per_call, seconds
    of_kind = _selection if case.kind == "select" else _training
    start, program, arguments, per_call = of_kind(case)
    key = jax.random.key(0)
    begin = time.monotonic()
    state = jax.eval_shape(start, key)
    compiled = program.lower(state, *arguments).compile()
    seconds = time.monotonic() - begin
    start = jax.jit(start).lower(key).compile()
    return start, _Work(compiled, arguments), per_call, seconds


def single(case: Case) -> Case:
    """The case of one arm, whose program arms in turns share."""
    return case._replace(kind="single", arms=1)


def _training(case: Case) -> tuple[Callable[[Any], Any], Any, tuple[Any, ...], int]:
    config, static = resolved(
        case.variant,
        case.mode,
        d_model=case.d_model,
        d_sae=case.d_sae,
        k=case.k,
        batch=case.batch,
        top_k=case.top_k,
    )
    shape = (DISPATCH, case.batch, case.d_model)
    rows = jax.random.normal(jax.random.key(2), shape, jnp.bfloat16)
    start = partial(
        first_state,
        static=static,
        scale=float(config.input_scale) / case.d_model**0.5,
    )
    numbers = hparams(config)
    if case.kind in ("known", "graphs"):
        return start, _known(static, case.kind), (rows, numbers), DISPATCH
    if case.kind != "grid":
        return start, compile_steps(static), (rows, DISPATCH, numbers), DISPATCH
    numbers = _arms(numbers, case.arms)
    return (
        lambda key: jax.vmap(start)(jax.random.split(key, case.arms)),
        compile_steps(static, arms=case.arms),
        (rows, DISPATCH, numbers),
        DISPATCH,
    )


def _known(static: SAEConfig, kind: str) -> Any:
    """As many steps as the program says, where the trainer's is told: the host need not
    ask the device after each whether there is another. `graphs`: in a CUDA graph."""
    step = partial(train_step, config=static)

    def steps(state: TrainState, rows: Any, numbers: Numbers) -> TrainState:
        return lax.fori_loop(
            0, DISPATCH, lambda i, s: step(s, rows[i], numbers)[0], state
        )

    options = compiler_options() or {}
    if kind == "graphs":
        options = options | {"xla_gpu_enable_command_buffer": IN_GRAPHS}
    return jax.jit(steps, donate_argnums=0, compiler_options=options)


def _arms(numbers: Numbers, arms: int) -> Numbers:
    """The numbers of arms that differ in k, below the static one, and in beta."""
    many = jax.tree.map(lambda value: jnp.repeat(value[None], arms, axis=0), numbers)
    odd = jnp.arange(arms) % 2
    return many | {
        "k": jnp.where(odd, jnp.maximum(many["k"] // 2, 1), many["k"]),
        "beta": many["beta"] * (1 + jnp.arange(arms) // 2),
    }


def _selection(case: Case) -> tuple[Callable[[Any], Any], Any, tuple[Any, ...], int]:
    """f in bfloat16 of z in float32, by one program for several batches."""

    def start(key: Any) -> tuple[Any, Any]:
        shape = (BATCHES, case.batch, case.d_sae)
        return jax.random.normal(key, shape), jnp.zeros(shape, jnp.bfloat16)

    def program(state: tuple[Any, Any], k: Any) -> tuple[Any, Any]:
        def select(z: Any) -> Any:
            f, _ = keep_top_k(z, k, k_max=case.k, method=case.top_k)  # pyright: ignore
            return f.astype(jnp.bfloat16)

        return state[0], lax.map(select, state[0])

    return start, jax.jit(program, donate_argnums=0), (jnp.int32(case.k),), BATCHES


if __name__ == "__main__":
    answer_all(measure, versions=prepare, errors=(Exception,))
