"""What a step costs on 64 and on 512 GPUs, by the compiler, without a GPU.

Claim: with states split over the mesh's axis `latents`, autoencoders of the size of
Gemma-2-9B with 131k latents and of Llama-3-70B with 1M latents train on 80 GB devices.

    python -m experiments.scale
    python -m experiments.scale --d_model=4096 --d_sae=65536 --mesh=data:2,latents:4

lowers the training step that `vsae_jax.train` runs, as for a GPU (four bits a pass,
bfloat16 products), from shapes alone, and compiles it for as many CPU devices, which
is the same partitioning into one program for all; nothing is allocated or run. Memory
is the compiler's own count; collectives are read in the compiled program. The times are
estimates from the rates below, not measurements. What was found: docs/results.md.
"""

import dataclasses
import math
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from vsae_jax.autoencoder import sae
from vsae_jax.config import TrainConfig, cli, resolve_train, sae_config
from vsae_jax.config.fields import flag
from vsae_jax.system.mesh import of_devices, over_data, tracing
from vsae_jax.training.layout import shaped, shardings
from vsae_jax.training.step import compile_steps, hparams, init_state

# Assumed of an H100 SXM in a node of eight: dense bfloat16 products at half of the 989
# TFLOP/s on its data sheet; memory at 80 % of 3.35 TB/s; NVLink at 80 % of 450 GB/s a
# direction; between nodes 400 Gb/s InfiniBand a GPU at 80 %.
MEMORY, FLOPS, HBM, NVLINK, NETWORK, NODE = 80e9, 495e12, 2.7e12, 360e9, 40e9, 8
_BYTES = {"f32": 4, "s32": 4, "u32": 4, "bf16": 2, "f16": 2, "pred": 1, "s8": 1}
_COLLECTIVE = re.compile(
    r"= (?P<shape>\(?[a-z0-9]+\[.*?) "
    r"(?P<kind>all-reduce|all-gather|reduce-scatter|all-to-all)(?:-start)?\("
    r".*?replica_groups=(?P<groups>mesh\S+(?: \{[^}]*\})?|\{\{[^}]*|\S+)"
)
_ONE = re.compile(r"\b(" + "|".join(_BYTES) + r")\[([\d,]*)\]")


@dataclass(frozen=True)
class ScaleConfig:
    """Compiles a training step for a mesh of GPUs and prints memory, collectives and
    an estimate of its time; without --mesh, the table of docs/results.md."""

    d_model: int = flag("of the residual stream", 3584)
    d_sae: int = flag("number of latents", 131_072)
    batch_size: int = flag("rows in a step, of all devices", 65_536)
    k: int = flag("latents kept per row", 64)
    variant: Literal["topk", "vsae_topk"] = flag("which autoencoder", "vsae_topk")
    mesh: str = flag("as in train: data:4,latents:2", "")


GEMMA = ScaleConfig()
LLAMA = ScaleConfig(d_model=8192, d_sae=2**20, batch_size=131_072)
TABLE = [
    *((GEMMA, m) for m in ("data:64", "data:8,latents:8", "latents:64")),
    *((LLAMA, m) for m in ("data:512", "data:64,latents:8", "data:32,latents:16")),
    *((LLAMA, m) for m in ("data:8,latents:64", "latents:512")),
]


class Collective(NamedTuple):
    """One operation in which devices wait for one another: bytes of its result on a
    device, and the devices of the first group that takes part together."""

    kind: str
    bytes: int
    group: tuple[int, ...]


def command(configs: Sequence[ScaleConfig]) -> None:
    """Prints the table, or the one row that was asked for."""
    asked = configs[0]
    rows = [(asked, asked.mesh)] if asked.mesh else TABLE
    cases = [dataclasses.replace(config, mesh=mesh) for config, mesh in rows]
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", max(_size(case.mesh) for case in cases))
    head = (
        "d_model, d_sae, batch | mesh | state GB | a step GB | of 80 GB | collectives "
        "over latents MB | over data MB | over both MB | products ms | memory ms | "
        "collectives ms | rows/s | compile s"
    )
    print(f"| {head} |\n|{'---|' * (head.count('|') + 1)}", flush=True)
    for case in cases:
        print(row(case), flush=True)


def row(case: ScaleConfig) -> str:
    """One line of the table."""
    began = time.monotonic()
    compiled = compile_step(case)
    seconds = time.monotonic() - began
    memory, found = compiled.memory_analysis(), collectives(compiled.as_text())
    state, work = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    data, latents = (_size(case.mesh, axis) for axis in ("data", "latents"))
    over = {"latents": 0, "data": 0, "both": 0}
    for collective in found:
        over[_axis(collective, latents)] += collective.bytes
    flops = 10 * case.batch_size * case.d_model * case.d_sae / (data * latents)
    products = flops / FLOPS
    touched = passes(case, data=data, latents=latents) / HBM
    talk = sum(map(seconds_of, found))
    cells = [
        f"{case.d_model}, {case.d_sae}, {case.batch_size}",
        case.mesh,
        f"{state / 1e9:.2f}",
        f"{work / 1e9:.2f}",
        f"{(state + work) / MEMORY:.0%}",
        *(f"{n / 1e6:.1f}" for n in over.values()),
        *(f"{t * 1e3:.1f}" for t in (products, touched, talk)),
        f"{case.batch_size / (products + touched + talk):.3g}",
        f"{seconds:.0f}",
    ]
    return f"| {' | '.join(cells)} |"


def compile_step(case: ScaleConfig) -> Any:
    """The compiled dispatch of one step, as `groups.compile_pass` makes it."""
    mesh = of_devices(jax.devices()[: _size(case.mesh)], case.mesh)
    config = resolve_train(
        TrainConfig(
            variant=case.variant,
            d_sae=case.d_sae,
            k=case.k,
            batch_size=case.batch_size,
        ),
        d_model=case.d_model,
    )
    static = sae_config(config, d_model=case.d_model, dtype="bfloat16")
    key = jax.random.key(0)
    init = partial(sae.init, config=static)
    state = jax.eval_shape(lambda: init_state(init(key), key, static))
    numbers = jax.eval_shape(lambda: hparams(config))
    rows = jax.ShapeDtypeStruct(
        (1, case.batch_size, case.d_model),
        jnp.bfloat16,
        sharding=over_data(mesh, before=1),
    )
    # The program of a GPU; only the CPU's compiler is here.
    with mock.patch.object(jax, "default_backend", lambda: "gpu"), tracing(mesh):
        lowered = compile_steps(static, places=shardings(state, mesh)).lower(
            shaped(state, mesh), rows, 1, shaped(numbers, mesh)
        )
    # Else the CPU stores each comparison before it adds, which a GPU does not.
    return lowered.compile({"xla_disable_hlo_passes": "tree_reduction_rewriter"})


def collectives(text: str) -> list[Collective]:
    """Those of a compiled program; one in a loop or a branch counts once, as a step
    runs it at most."""
    return [
        Collective(match["kind"], _bytes(match["shape"]), _first_group(match["groups"]))
        for match in _COLLECTIVE.finditer(text)
    ]


def seconds_of(c: Collective) -> float:
    """In a ring, each device at its link's rate; an all-reduce goes around twice."""
    turns, n = 2 if c.kind == "all-reduce" else 1, len(c.group)
    in_node = c.group[0] // NODE == c.group[-1] // NODE
    return turns * (n - 1) / n * c.bytes / (NVLINK if in_node else NETWORK)


def passes(case: ScaleConfig, *, data: int, latents: int) -> float:
    """Bytes that the step reads and writes outside of its products on a device: Adam
    on float32 parameters and their operands anew in bfloat16 (36 bytes a parameter);
    z written and read by eight passes of the selection, f, its gradient, and the noise
    in bfloat16 or float32 (60 bytes a latent of a row)."""
    parameters = 2 * case.d_model * case.d_sae / latents
    return 36 * parameters + 60 * case.batch_size / data * case.d_sae / latents


def _size(mesh: str, axis: str = "") -> int:
    sizes = re.findall(rf"({axis}\w*):(\d+)", mesh)
    return math.prod(int(size) for _, size in sizes)


def _axis(c: Collective, latents: int) -> Literal["latents", "data", "both"]:
    """Which axis of the mesh a group lies along; devices are in the mesh's order."""
    if len(c.group) > 1 and c.group[1] - c.group[0] == latents:
        return "data"
    return "latents" if len(c.group) == latents else "both"


def _bytes(shape: str) -> int:
    return sum(
        _BYTES[kind] * math.prod(int(n) for n in dims.split(",") if n)
        for kind, dims in _ONE.findall(shape)
    )


def _first_group(text: str) -> tuple[int, ...]:
    """The first of a collective's groups of devices, in XLA's three ways to write them:
    `{{0,1},{2,3}}`, `[2,2]<=[2,2]T(1,0)` and `mesh['a'=2,'b'=2] {'b'}`."""
    if text.startswith("{{"):
        return tuple(int(n) for n in text[2:].split(","))
    if iota := re.match(r"\[\d+,(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        dims = [int(n) for n in iota[2].split(",")]
        order = [
            int(n) for n in (iota[3] or ",".join(map(str, range(len(dims))))).split(",")
        ]
        ids = np.arange(math.prod(dims)).reshape(dims).transpose(order)
        return tuple(ids.ravel()[: int(iota[1])].tolist())
    axes = {name: int(n) for name, n in re.findall(r"'(\w+)'=(\d+)", text)}
    chosen = re.findall(r"'(\w+)'", text.partition("{")[2]) or list(axes)
    ids = np.arange(math.prod(axes.values())).reshape(*axes.values())
    first = ids[tuple(slice(None) if name in chosen else 0 for name in axes)]
    return tuple(first.ravel().tolist())


if __name__ == "__main__":
    cli.main(command, ScaleConfig)
