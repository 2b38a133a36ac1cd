"""Training on eight devices beside training on one: run by test_mesh.py in a process
of its own, since XLA counts its devices when JAX starts.

    XLA_FLAGS=--xla_force_host_platform_device_count=8 python tests/mesh_cases.py \
        data:4,latents:2 topk vsae_topk

prints a line of JSON a case: the largest difference of a parameter, as a share of that
array's largest entry, and what else the test looks at. With PROCESS=host:port,2,0 and
PROCESS=host:port,2,1 in the environment of two processes the devices are of both.
"""

import json
import os
import sys
from typing import Any
from unittest import mock

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from vsae_jax.autoencoder import sae, sparsity
from vsae_jax.config import TrainConfig, resolve_train, sae_config
from vsae_jax.system import mesh as meshes
from vsae_jax.system import processes
from vsae_jax.training import groups, layout, step

D, D_SAE, B, STEPS = 16, 64, 32, 20
DEAD: dict[str, Any] = {"variant": "topk", "auxk": 0.5, "dead_after_tokens": 40}
# A latent that is the only one its row keeps has, while encoder and decoder are tied, a
# gradient of 0 but for rounding, which Adam without an epsilon makes a whole step of.
BATCH: dict[str, Any] = {"variant": "batch_topk", "adam_eps": 1e-2}
CASES: dict[str, dict[str, Any]] = {
    "relu": {"variant": "relu"},
    "topk": DEAD,
    "vsae": {"variant": "vsae"},
    "vsae_topk": {},
    "learned": {"variance": "learned"},
    "free": {"decoder_norm": "free", "subtract_b_dec": False},
    "magnitude": {"selection": "magnitude", "kl_over": "selected"},
    "relu on mu": {"relu": True},
    "auxk by variance": DEAD | {"auxk_units": "variance"},
    "kl and auxk": {"auxk": 0.5, "dead_after_tokens": 40},
    "lax": {"top_k": "lax"},
    "bfloat16": {"dtype": "bfloat16"},
    "clipped": {"clip_norm": 1e-3},
    "batch_topk with auxk": DEAD | BATCH,
    "vsae_batch_topk": {"variant": "vsae_batch_topk"},
    "batch_topk by lax": BATCH | {"top_k": "lax", "auxk": 0.0},
    "jump_relu": {"variant": "jump_relu", "bandwidth": 2.0},
    "gated": {"variant": "gated"},
    "matryoshka": BATCH | {"variant": "vsae_matryoshka", "prefixes": "7:16:40"},
    "vaease": {"variant": "vaease"},
    "vsae_jump_relu": {"variant": "vsae_jump_relu", "target_l0": 0.0, "l0": 1.0},
}


def arm(*, mesh: Any = None, seed: int = 0, **fields: Any) -> groups.Arm:
    """A run's first state and numbers."""
    options = {"d_sae": D_SAE, "k": 4, "steps": 40, "batch_size": B, "lr": 2e-3}
    config = resolve_train(TrainConfig(**options | fields), d_model=D)
    dtype = "bfloat16" if config.dtype == "bfloat16" else "float32"
    static = sae_config(config, d_model=D, dtype=dtype)

    def state() -> step.TrainState:
        weights, noise = jax.random.split(jax.random.key(seed))
        return step.init_state(sae.init(weights, static), noise, static)

    numbers = layout.make(lambda: step.hparams(config), mesh=mesh)
    return groups.Arm(static, numbers, layout.make(state, mesh=mesh))


def trained(arms: list[groups.Arm], *, mesh: Any, how: str = "loop") -> list[Any]:
    """The states after 20 steps, as NumPy arrays."""
    x = 10 * np.random.default_rng(3).normal(size=(STEPS, B, D)).astype(np.float32)
    place = meshes.over_data(mesh, before=1)
    shape = jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)
    plan = groups.compile_pass(arms, shape, how=how, mesh=mesh)
    if mesh is not None:
        x = jax.make_array_from_callback(x.shape, place, lambda index: x[index])
    states = groups.states(groups.advance(plan.groups, x, STEPS))
    gather = jax.device_get if mesh is None else processes.gathered
    return [gather(states[i]._replace(key=None)) for i in sorted(states)]


def difference(one: Any, many: Any) -> dict[str, float]:
    """Between two states: parameters, and the counters and sums that follow them."""
    return {
        "parameters": max(
            float(np.abs(a - many.params[name]).max() / np.abs(a).max())
            for name, a in one.params.items()
        ),
        "silence": float(np.abs(one.rows_since_fired - many.rows_since_fired).max()),
        "loss": float(abs(one.totals.sums["loss"] / many.totals.sums["loss"] - 1)),
        "buffers": max(
            float(np.abs(a - many.norm[name]).max()) for name, a in one.norm.items()
        ),
        "auxk": float(one.totals.sums.get("auxk", 0)),
        "steps": int(many.totals.steps),
    }


def case(name: str, mesh: Any) -> dict[str, float]:
    """One variant, on one device and on all."""
    fields = CASES[name]
    (one,) = trained([arm(**fields)], mesh=None)
    (many,) = trained([arm(mesh=mesh, **fields)], mesh=mesh)
    return difference(one, many)


def grid(mesh: Any) -> dict[str, float]:
    """Three arms at once and one after another, on all devices."""
    numbers = [{"beta": 0.0}, {"beta": 0.5, "seed": 1}, {"k": 8}]
    arms = [arm(mesh=mesh, **fields) for fields in numbers]
    together = trained(arms, mesh=mesh, how="vmap")
    ones = [trained([arm(**fields)], mesh=None)[0] for fields in numbers]
    worst = [difference(*pair) for pair in zip(ones, together, strict=True)]
    return max(worst, key=lambda found: found["parameters"])


def top_k(mesh: Any) -> dict[str, int]:
    """Rows in which the selection over split latents is not jax.lax.top_k's, of random,
    tied and equal values, in the way of a CPU and in that of a GPU."""
    rng = np.random.default_rng(0)
    z = rng.normal(size=(64, D_SAE)).astype(np.float32)
    kinds = [z, np.round(z) + 0.0, np.maximum(z, 0), np.zeros_like(z), -np.abs(z)]
    rows = np.concatenate([*kinds, np.where(z > 0.5, 1, z)])
    place = NamedSharding(mesh, PartitionSpec("data", "latents"))
    wrong, seen = 0, 0
    for backend in ("cpu", "gpu"):
        for of, reference in (
            (sparsity.top_k_count, sparsity.top_k_lax),
            (sparsity.batch_top_k_count, sparsity.batch_top_k_lax),
        ):
            with (
                mock.patch.object(jax, "default_backend", lambda way=backend: way),
                meshes.tracing(mesh),
            ):

                def count(z: Any, k: Any, of: Any = of) -> Any:
                    return of(z, k)

                # A function of its own, or JAX would reuse the other way's trace.
                select = jax.jit(count, in_shardings=(place, None))
                masks = {
                    k: processes.gathered(select(rows, np.int32(k)))
                    for k in (1, 5, 33, 63, 64)
                }
            for k, mask in masks.items():
                whole = jax.numpy.asarray(rows)
                expected = np.asarray(reference(whole, k, k_max=D_SAE))
                wrong += int((mask != expected).any(axis=1).sum())
                seen += len(rows)
    return {"rows": seen, "different": wrong}


def main(text: str, *names: str) -> None:
    """Prints the cases' results."""
    with processes.joined(flags()):
        mesh = meshes.open_mesh(text)
        others = {"grid": grid, "top_k": top_k}
        for n in names:
            found = others[n](mesh) if n in others else case(n, mesh)
            print(json.dumps({n: found}), flush=True)


def flags() -> TrainConfig:
    """Of a process among several: PROCESS=host:port,count,id in the environment."""
    coordinator, _, numbers = os.environ.get("PROCESS", "").partition(",")
    if not coordinator:
        return TrainConfig()
    count, i = map(int, numbers.split(","))
    return TrainConfig(coordinator=coordinator, num_processes=count, process_id=i)


if __name__ == "__main__":
    main(*sys.argv[1:])
