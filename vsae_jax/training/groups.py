"""Arms of a grid that are trained together: every arm sees the same batches.

Arms whose static switches agree share one compiled function. `vmap` runs them at once,
which keeps a GPU busy. `loop` runs them one after another on the same batches, which is
faster on a CPU; an arm's steps then are those of a single run, bit for bit.
"""

import dataclasses
import math
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array

from vsae_jax.autoencoder import sae
from vsae_jax.config import SAEConfig
from vsae_jax.system.memory import free_bytes
from vsae_jax.system.mesh import bytes_each, tracing
from vsae_jax.training.layout import make, shardings
from vsae_jax.training.native import Kernels
from vsae_jax.training.step import Numbers, TrainState, compile_steps

# The share of the free memory that a pass may take.
_SHARE = 0.8


class Arm(NamedTuple):
    """An arm: its static switches, its numbers, its state and its kernels."""

    config: SAEConfig
    numbers: Numbers
    state: TrainState
    kernels: Kernels = "xla"


class Group(NamedTuple):
    """Arms, by their places in the pass, that one call advances. With several, each
    array of `state` and `numbers` has a leading axis over them."""

    arms: tuple[int, ...]
    numbers: Numbers
    state: TrainState
    run: Callable[[TrainState, Array, int, Numbers], TrainState]


class Plan(NamedTuple):
    """A compiled pass: its groups, the bytes of states and of work on one device, the
    number of compiled functions, and the seconds that compiling took."""

    groups: list[Group]
    state_bytes: int
    work_bytes: int
    functions: int
    seconds: float


def compile_pass(
    arms: Sequence[Arm],
    rows: jax.ShapeDtypeStruct,
    *,
    how: str,
    mesh: Mesh | None = None,
) -> Plan:
    """Compiles what trains `arms` on `rows [n_max, batch, d_model]` a dispatch; `how`
    is vmap, loop or auto (vmap on a GPU). Arms lie on `mesh` already."""
    if how == "auto":
        how = "vmap" if jax.default_backend() == "gpu" else "loop"
    start, lowered = time.monotonic(), {}
    waiting = []
    for (config, kernels), members in _same_switches(arms).items():
        sets = [members] if how == "vmap" else [(place,) for place in members]
        for places in sets:
            state = _stack([arms[place].state for place in places], mesh)
            numbers = _stack([arms[place].numbers for place in places], mesh)
            kind = config, kernels, len(places)
            if kind not in lowered:
                lie = None if mesh is None else shardings(state, mesh)
                steps = compile_steps(
                    config, kernels=kernels, arms=len(places), places=lie
                )
                with tracing(mesh):
                    lowered[kind] = steps.lower(state, rows, 1, numbers)
            waiting.append((kind, places, numbers, state))
    # Programs compile in parallel: each keeps about one core busy for seconds.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        programs = pool.map(lambda program: program.compile(), lowered.values())
        compiled = dict(zip(lowered, programs, strict=True))
    groups = [
        Group(places, numbers, state, compiled[kind])
        for kind, places, numbers, state in waiting
    ]
    return Plan(
        groups=groups,
        state_bytes=sum(bytes_each(group.state) for group in groups),
        work_bytes=max(map(_work_bytes, compiled.values())),
        functions=len(compiled),
        seconds=time.monotonic() - start,
    )


def advance(groups: Sequence[Group], rows: Array, n: int) -> list[Group]:
    """The groups after `n` more steps, on the first `n` batches of `rows`."""
    return [
        group._replace(state=group.run(group.state, rows, n, group.numbers))
        for group in groups
    ]


def states(groups: Sequence[Group]) -> dict[int, TrainState]:
    """Each arm's own state, by place."""
    return {
        place: member(group.state, i, len(group.arms))
        for group in groups
        for i, place in enumerate(group.arms)
    }


def split(arms: Sequence[Any], bytes_of_one: int) -> list[list[Any]]:
    """The arms in passes of as many as the device has room for, at least one."""
    room = max(int(_SHARE * free_bytes() / max(bytes_of_one, 1)), 1)
    passes = -(-len(arms) // room)
    size = -(-len(arms) // passes)
    return [list(arms[i : i + size]) for i in range(0, len(arms), size)]


def bytes_of_one(
    config: SAEConfig, *, batch_size: int, mesh: Mesh | None = None
) -> int:
    """About the bytes that one more arm takes on a device: float32 parameters, Adam's
    moments and gradients, and what a step keeps of each row in a batch."""
    shape = {"data": 1, "latents": 1} if mesh is None else mesh.shape
    d_sae = config.d_sae // shape["latents"]
    of_device = dataclasses.replace(config, d_sae=d_sae, k=1, k_aux=1, prefixes="none")
    rows = batch_size // shape["data"]
    of_a_row = 16 * d_sae + 20 * config.d_model
    return 5 * bytes_of_parameters(of_device) + rows * of_a_row


def bytes_of_parameters(config: SAEConfig) -> int:
    """The bytes of all trained arrays, in float32."""
    arrays = sae.arrays(config).values()
    return 4 * sum(math.prod(spec.shape(config)) for spec in arrays)


def _same_switches(
    arms: Sequence[Arm],
) -> dict[tuple[SAEConfig, Kernels], tuple[int, ...]]:
    """The places of arms by their static config and kernels; k there is the largest of
    the arms'."""
    sets: dict[tuple[SAEConfig, Kernels], list[int]] = {}
    for place, arm in enumerate(arms):
        key = dataclasses.replace(arm.config, k=arm.config.d_sae)
        sets.setdefault((key, arm.kernels), []).append(place)
    return {
        (
            dataclasses.replace(key, k=max(arms[p].config.k for p in places)),
            kernels,
        ): tuple(places)
        for (key, kernels), places in sets.items()
    }


def _stack(trees: Sequence[Any], mesh: Mesh | None) -> Any:
    if len(trees) == 1:
        return trees[0]
    return make(
        lambda *each: jax.tree.map(lambda *leaves: jnp.stack(leaves), *each),
        *trees,
        mesh=mesh,
    )


def member(tree: Any, i: int, n: int) -> Any:
    """The i-th of n arms from a tree of stacked arrays; a single arm is not stacked."""
    return tree if n == 1 else jax.tree.map(lambda leaf: leaf[i], tree)


def _work_bytes(compiled: Any) -> int:
    analysis = compiled.memory_analysis()
    return 0 if analysis is None else analysis.temp_size_in_bytes
