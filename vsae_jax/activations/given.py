"""Rows that are given from Python, as an array or in batches."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from vsae_jax.activations.manifest import READ, Manifest, Shard
from vsae_jax.activations.shards import Activations
from vsae_jax.system import progress
from vsae_jax.system.errors import UserError, one_line

_AT_ONCE_BYTES = 2**26
# The first rows of batches, which decide the scale and the mean.
_SAMPLE_ROWS = 8192
_EXPECTED = (
    "expected an array [rows, d_model] of floats, an .npy file of one, a folder that "
    "extract wrote, or an iterator of batches [rows, d_model]"
)


class GivenRows(Activations):
    """The rows of an array `[rows, d_model]`, in memory or mapped from a file, each a
    context of its own. `name` is for messages; `known` is what is known of the language
    model, under the names of a run's `data`."""

    known: dict[str, Any] = {}

    def __init__(self, array: Float[np.ndarray, "rows d_model"], *, name: str):
        self._array, self._dtype = array, READ[_dtype(array)]
        super().__init__(Path(name), _manifest(array, *self._statistics()))

    def _statistics(self) -> tuple[Float[np.ndarray, " d_model"], float]:
        """Mean and mean squared norm of the finite rows."""
        n, d_model = self._array.shape
        total, squares, finite = np.zeros(d_model), 0.0, 0
        step = max(_AT_ONCE_BYTES // (8 * d_model), 1)
        with progress.bar(n, unit="rows read") as bar:
            for start in range(0, n, step):
                rows = self.view(start, min(start + step, n)).astype(np.float64)
                bar.update(len(rows))
                rows = rows[np.isfinite(rows).all(1)]
                total += rows.sum(0)
                squares += float(np.einsum("ij,ij->", rows, rows))
                finite += len(rows)
        return total / max(finite, 1), squares / max(finite, 1)

    def view(self, start: int, stop: int) -> Float[np.ndarray, "rows d_model"]:
        return np.asarray(self._array[start:stop], self._dtype)

    def verify(self, shards: object) -> None:
        """Does nothing: given rows have no checksums."""

    def located(self, row: int) -> tuple[Path, str]:
        return self.folder, f"row {row}"

    def described(self) -> dict[str, Any]:
        m = self.manifest
        size = {"rows": self.n_rows, "mean_squared_norm": m.mean_squared_norm}
        return {**self.known, "dtype": m.dtype, **size}


class GivenBatches(GivenRows):
    """Batches `[rows, d_model]` of any length, read in their order. What is not an
    iterator, such as a list or a data loader, starts again at its end.

    Scale and mean are those of the first 8,192 rows, or of all if there are fewer.
    """

    in_order = True

    def __init__(self, batches: Iterable[Any]):
        self._batches, self._again = iter(batches), None
        self._first, self._kept = 0, [_array(next(self._batches, None), "a batch")]
        self._d_model = self._kept[0].shape[1]
        self._fill(_SAMPLE_ROWS)
        self._again = None if self._batches is batches else batches
        sample = np.concatenate(self._kept)[:_SAMPLE_ROWS]
        super().__init__(sample, name="the batches")

    def view(self, start: int, stop: int) -> Float[np.ndarray, "rows d_model"]:
        """The rows start, ..., stop - 1; rows before `start` are discarded."""
        there = self._fill(stop)
        if there < stop:
            raise UserError(
                f"the batches end after {there:,} rows, but {stop:,} are trained on: "
                "give more batches or fewer steps"
            )
        while start >= self._first + len(self._kept[0]):
            self._first += len(self._kept.pop(0))
        rows, read = [], self._first
        for batch in self._kept:
            rows.append(batch[max(start - read, 0) : max(stop - read, 0)])
            read += len(batch)
        return np.concatenate(rows).astype(self._dtype, copy=False)

    def described(self) -> dict[str, Any]:
        return {**self.known, "dtype": self.manifest.dtype}

    def _fill(self, stop: int) -> int:
        """Reads on to row `stop` or the batches' end; returns how many rows came."""
        there = self._first + sum(map(len, self._kept))
        while there < stop and (batch := self._next()) is not None:
            self._kept.append(_array(batch, "a batch", d_model=self._d_model))
            there += len(batch)
        return there

    def _next(self) -> Any:
        """The next batch, None at the end."""
        batch = next(self._batches, None)
        if batch is None and self._again is not None:
            self._batches = iter(self._again)
            batch = next(self._batches, None)
        return batch


def given(rows: Any) -> Activations:
    """The rows to train on, from anything that `vsae_jax.fit` takes."""
    if isinstance(rows, Activations):
        return rows
    if isinstance(rows, str | Path):
        path = Path(rows)
        return _mapped(path) if path.suffix == ".npy" else Activations.open(path)
    if hasattr(rows, "shape"):
        return GivenRows(_array(rows, "the array"), name="the array")
    if isinstance(rows, Iterable):
        return GivenBatches(rows)
    raise UserError(f"rows is a {type(rows).__name__}; {_EXPECTED}")


def _mapped(path: Path) -> GivenRows:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {one_line(error)}") from None
    return GivenRows(_array(array, str(path)), name=str(path))


def _array(rows: Any, name: str, *, d_model: int | None = None) -> np.ndarray:
    """An array `[rows, d_model]` of floats, from NumPy, JAX or torch."""
    if rows is None:
        raise UserError(f"there is no batch; {_EXPECTED}")
    if hasattr(rows, "detach"):  # NumPy cannot read torch's bfloat16
        rows = rows.detach().float().cpu()
    array = np.asarray(rows)
    floats = jnp.issubdtype(array.dtype, jnp.floating)
    wide = array.ndim == 2 and d_model in (None, array.shape[1])
    if not floats or not wide or not array.size:
        wanted = "" if d_model is None else f", with d_model={d_model} as the first"
        raise UserError(
            f"{name} is {array.dtype}{list(array.shape)}; {_EXPECTED}{wanted}"
        )
    return array


def _dtype(array: np.ndarray) -> str:
    """The dtype that rows are read as: their own, if training knows it."""
    own = np.dtype(array.dtype).name
    return own if own in READ else "float32"


def _manifest(array: np.ndarray, mean: np.ndarray, mean_squared_norm: float):
    """The manifest of rows whose text and language model are not known."""
    n, d_model = array.shape
    names = "model revision revision_asked backend config_hash tokenizer_hash hook_name"
    names = [*names.split(), "dataset", "split", "text_column"]
    unknown: dict[str, Any] = dict.fromkeys(names, "")
    unknown |= dict.fromkeys(["layer", "bos_id", "skip_positions"], 0)
    return Manifest(
        **unknown,
        d_model=d_model,
        vocab_size=1,
        dtype=_dtype(array),
        context_length=1,
        bos="none",
        special_ids=(),
        center_residual=False,
        num_tokens=n,
        shard_contexts=n,
        complete=True,
        mean=tuple(mean.tolist()),
        mean_squared_norm=mean_squared_norm,
        shards=(Shard(n, n, "", ""),),
    )
