"""The batches of a run on their way to the device.

`--feed=stream` reads them from the shards, ahead of the steps, in the dtype on disk.
`--feed=device` puts all rows on the device once and gathers batches there: the same
ones in the same order. With `--stream` they come from the language model instead. On a
mesh each device gets its rows of a batch, and each of several processes reads its own.
"""

from collections.abc import Callable
from typing import Self

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from vsae_jax.activations.bad_rows import Check
from vsae_jax.activations.further import FurtherRows
from vsae_jax.activations.shards import READ
from vsae_jax.activations.shuffle import Part, ShuffledRows
from vsae_jax.system import processes
from vsae_jax.system.errors import UserError
from vsae_jax.system.memory import free_bytes
from vsae_jax.system.mesh import over_data, own_rows, whole
from vsae_jax.training.plan import PlannedRun

# The share of a device's free memory that rows may take.
_SHARE = 0.5
_ROWS_AT_ONCE = 2**16


class InOrder:
    """Rows in the order in which they come, with the methods of `ShuffledRows`."""

    def __init__(self, read: Callable[[int, int], np.ndarray]):
        self._read = read

    def take(self, position: int, count: int) -> Shaped[np.ndarray, "count d_model"]:
        """The rows `position` to `position + count`."""
        return self._read(position, position + count)

    def close(self) -> None:
        """Nothing."""


class Feed:
    """The rows that a planned run trains on, in their order. A context manager."""

    def __init__(self, planned: PlannedRun):
        c = planned.train
        self._read, self._n_rows = planned.activations.view, planned.data["train_rows"]
        self._further: FurtherRows | None = None
        if c.stream:
            each = planned.activations.rows_per_context
            self._n_rows = -(-c.buffer_rows // each) * each
            self._further = FurtherRows(planned.activations, giant=c.giant)
            self._read = self._further.read
        elif c.bad_rows == "stop":
            self._read = Check(planned.activations, giant=c.giant).rows
        self._batch, self._mesh = c.batch_size, planned.mesh
        self._own = own_rows(planned.mesh, self._batch)
        self.dtype = np.dtype(READ[planned.data["dtype"]])
        row_bytes = planned.sae.d_model * self.dtype.itemsize
        self._d_model = planned.sae.d_model
        order = {
            "n_rows": self._n_rows,
            "row_bytes": row_bytes,
            "seed": c.data_seed,
            "left_out": planned.left_out.rows if planned.left_out else (),
            "forward": c.stream,
        }
        # The same stream, but of the rows' numbers instead of the rows.
        self._numbers = ShuffledRows(_numbers, **order)
        if c.stream and processes.count() > 1:
            raise UserError(
                "--stream runs in one process; leave it out, or start one process only"
            )
        if c.feed == "device" and processes.count() > 1:
            raise UserError(
                "--feed=device would put every row on every device, but each of "
                "several processes reads only its own; use --feed=stream"
            )
        self._resident: Array | None = None
        if planned.activations.in_order:
            self._rows = InOrder(self._read)
        elif not c.stream and _on_device(c.feed, self._n_rows * row_bytes):
            self._resident, self._rows = self._put(), self._numbers
        else:
            own = Part(self._batch, *self._own)
            self._rows = ShuffledRows(self._read, **order, part=own, prefetch=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self._further is not None:
            self._further.close()
        self._rows.close()

    def first(self, count: int) -> Float[Array, "rows d_model"]:
        """The stream's first rows, at most one epoch, in float32; every process gets
        all of them."""
        count = min(count, self._n_rows)
        if self._own == (0, self._batch):
            rows = self._on_device(self._rows.take(0, count))
            return rows.astype(jnp.float32)
        numbers = self._numbers.take(0, count)[:, 0]
        rows = np.empty((count, self._d_model), self.dtype)
        for place in np.argsort(numbers).tolist():
            rows[place] = self._read(int(numbers[place]), int(numbers[place]) + 1)
        return jnp.asarray(rows).astype(jnp.float32)

    def shape(self, n_max: int) -> jax.ShapeDtypeStruct:
        """Shape, dtype and sharding of what `stack` gives."""
        shape = (n_max, self._batch, self._d_model)
        place = over_data(self._mesh, before=1)
        return jax.ShapeDtypeStruct(shape, self.dtype, sharding=place)

    def stack(
        self, position: int, count: int, *, n_max: int
    ) -> Float[Array, "n_max batch d_model"]:
        """`count` batches from row `position` on; the others up to `n_max`, which are
        not used, repeat the last row."""
        if self._mesh is not None:
            return self._spread(position, count, n_max)
        taken = self._rows.take(position, count * self._batch)
        unused = (n_max - count) * self._batch
        if unused:
            taken = np.pad(taken, ((0, unused), (0, 0)), mode="edge")
        return self._on_device(taken.reshape(n_max, self._batch, -1))

    def _on_device(self, taken: np.ndarray) -> Array:
        """Rows, or the rows of these numbers where all are on the device."""
        if self._resident is None:
            return jnp.asarray(taken)
        return self._resident[jnp.asarray(taken[..., 0], jnp.int32)]

    def _spread(self, position: int, count: int, n_max: int) -> Array:
        """The same on a mesh: this process's rows, each sent to its device. Nothing
        here may wait for another process, since it runs beside the steps."""
        taken = self._rows.take(position, count * self._batch)
        if self._resident is not None:
            taken = taken.astype(np.int32)
        own = self._own[1] - self._own[0]
        unused = (n_max - count) * own
        taken = np.pad(taken, ((0, unused), (0, 0)), mode="edge")
        rows = jax.make_array_from_process_local_data(
            over_data(self._mesh, before=1),
            taken.reshape(n_max, own, -1),
            (n_max, self._batch, taken.shape[1]),
        )
        return rows if self._resident is None else self._resident[rows[:, :, 0]]

    def _put(self) -> Array:
        """All rows, written into one array a piece at a time."""
        rows = jnp.zeros(
            (self._n_rows, self._d_model), self.dtype, device=whole(self._mesh)
        )
        write = jax.jit(
            lambda rows, piece, start: jax.lax.dynamic_update_slice_in_dim(
                rows, piece, start, 0
            ),
            donate_argnums=0,
        )
        for start in range(0, self._n_rows, _ROWS_AT_ONCE):
            piece = self._read(start, min(start + _ROWS_AT_ONCE, self._n_rows))
            rows = write(rows, jnp.asarray(piece), start)
        return rows


def _numbers(start: int, stop: int) -> np.ndarray:
    return np.arange(start, stop, dtype=np.int64)[:, None]


def _on_device(feed: str, data_bytes: int) -> bool:
    if feed != "auto":
        return feed == "device"
    alone = processes.count() == 1
    on_gpu = alone and jax.default_backend() == "gpu"
    return on_gpu and data_bytes < _SHARE * free_bytes()
