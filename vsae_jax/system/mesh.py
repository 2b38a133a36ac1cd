"""The devices of a run: one mesh with the axes `data` and `latents`.

training/layout.py says which array lies where. One device needs no mesh (None below);
then nothing here has an effect. With a mesh the step is the same function: XLA splits
it according to where its arguments lie, and adds the communication.
"""

import contextlib
import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import (
    AxisType,
    Mesh,
    NamedSharding,
    PartitionSpec,
)

from vsae_jax.system.errors import UserError

AXES = ("data", "latents")


def open_mesh(text: str) -> Mesh | None:
    """The mesh that `--mesh` asks for, of all devices of all processes; None for one
    device."""
    devices = sorted(jax.devices(), key=lambda d: (d.process_index, d.id))
    mesh = of_devices(devices, text)
    return None if mesh.size == 1 else mesh


def of_devices(devices: Sequence[Any], text: str) -> Mesh:
    """`devices` as a mesh. Neighbours on the axis `latents`, which wait for one another
    within a step, are neighbours in the list, in one process if possible."""
    shape = sizes(text, n_devices=len(devices))
    grid = np.array(devices).reshape(*shape.values())
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def sizes(text: str, *, n_devices: int) -> dict[str, int]:
    """`data:4,latents:2` as {"data": 4, "latents": 2}; "" is all devices on data."""
    if not text:
        return {"data": n_devices, "latents": 1}
    found: dict[str, int] = {}
    for part in text.split(","):
        match = re.fullmatch(r"(\w+):(\d{1,6})", part.strip())
        if match is None:
            raise UserError(f"--mesh={text} is not of the form data:4,latents:2")
        name, size = match[1], int(match[2])
        if name not in AXES or name in found or size < 1:
            raise UserError(
                f"--mesh={text}: {part.strip()} is wrong; the axes are data and "
                "latents, each once, with at least 1 device"
            )
        found[name] = size
    if math.prod(found.values()) != n_devices:
        raise UserError(
            f"--mesh={text} is a mesh of {math.prod(found.values())} devices and there "
            f"are {n_devices}: its sizes must multiply to {n_devices}, as in "
            f"--mesh=data:{n_devices}"
        )
    return {name: found.get(name, 1) for name in AXES}


def check(mesh: Mesh | None, *, d_sae: int, batch_size: int) -> None:
    """Refuses sizes that the mesh cannot cut into equal parts."""
    if mesh is None:
        return
    for flag, value, axis in (
        ("d_sae", d_sae, "latents"),
        ("batch_size", batch_size, "data"),
    ):
        if value % mesh.shape[axis]:
            raise UserError(
                f"--{flag}={value} must be a multiple of {mesh.shape[axis]}, the "
                f"devices on the mesh's axis {axis} (--mesh={name(mesh)})"
            )


def name(mesh: Mesh | None) -> str:
    """The mesh as one would give it to `--mesh`."""
    shape = {"data": 1} if mesh is None else mesh.shape
    return ",".join(f"{axis}:{size}" for axis, size in shape.items())


def shards(axis: str) -> int:
    """The number of parts into which the program being traced cuts `axis`."""
    return jax.sharding.get_abstract_mesh().shape.get(axis, 1)


def is_split() -> bool:
    """Whether the program that is being traced is for several devices."""
    return any(shards(axis) > 1 for axis in AXES)


def tracing(mesh: Mesh | None) -> contextlib.AbstractContextManager[Any]:
    """Within the block, programs are traced for `mesh`."""
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def over_data(mesh: Mesh | None, *, before: int = 0) -> Any:
    """The sharding of rows `[..., batch, d_model]` with `before` leading axes."""
    if mesh is None:
        return None
    return NamedSharding(mesh, PartitionSpec(*[None] * before, "data"))


def whole(mesh: Mesh | None) -> Any:
    """The sharding of what every device holds whole."""
    return None if mesh is None else NamedSharding(mesh, PartitionSpec())


def own_rows(mesh: Mesh | None, batch: int) -> tuple[int, int]:
    """The rows `start, stop` of a batch that this process's devices hold."""
    if mesh is None:
        return 0, batch
    places = over_data(mesh).addressable_devices_indices_map((batch,)).values()
    ends = [place[0].indices(batch) for place in places]
    return min(start for start, _, _ in ends), max(stop for _, stop, _ in ends)


def filled(tree: Any, values: Any) -> Any:
    """Arrays with the shapes and shardings of those in `tree`, filled with `values`."""

    def fill(old: jax.Array, value: Any) -> jax.Array:
        new = np.full(old.shape, value, old.dtype)
        return jax.make_array_from_callback(
            old.shape, old.sharding, lambda index: new[index]
        )

    return jax.tree.map(fill, tree, values)


def bytes_each(tree: Any) -> int:
    """Bytes of the arrays on one device."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )
