"""Activation rows that are not to be trained on: NaN, infinite, giant, or massive.

A row is giant when one of its values is beyond `--giant` times the median norm of the
first rows, which is a fault. `--bad_rows=stop` names the first such row that is read;
`skip` reads all rows before the start and leaves such rows out, also of the mean and
the norm. `--max_norm_multiple` leaves out rows whose norm is beyond that many medians:
the language model does make them, but they are few and large enough to rule the loss.
"""

import functools
import hashlib
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np
from jaxtyping import Bool, Float, Int

from vsae_jax.activations.given import GivenRows
from vsae_jax.activations.shards import Activations
from vsae_jax.system import progress
from vsae_jax.system.errors import UserError

_SAMPLE_ROWS = 4096
# Rows are looked at in pieces that fit into a core's cache.
AT_ONCE_BYTES = 2**20


class LeftOut(NamedTuple):
    """The numbers of the rows that are left out, ascending; the mean and mean squared
    norm of the others; and the reason: "are NaN, ..." or "have a norm above ..."."""

    rows: Int[np.ndarray, " bad"]
    mean: Float[np.ndarray, " d_model"]
    mean_squared_norm: float
    why: str

    def described(self) -> str:
        """The entry of a run's config: how many rows, and a hash of which."""
        digest = hashlib.sha256(self.rows.astype("<i8").tobytes()).hexdigest()
        return f"{len(self.rows)} rows, sha256 {digest[:16]}"


class Check:
    """Finds the bad rows of a folder; `giant` is the flag."""

    def __init__(self, activations: Activations, *, giant: float):
        self._activations, self._giant = activations, giant
        self._median, end = _median_norm(activations)
        self._limit = min(giant * self._median, end) if self._median else end

    def rows(self, start: int, stop: int) -> Float[np.ndarray, "rows d_model"]:
        """The rows start, ..., stop - 1, like `Activations.view`; refuses bad ones."""
        rows = self._activations.view(start, stop)
        bad = np.flatnonzero(self.bad(rows))
        if len(bad):
            raise UserError(self._named(start + bad, of=stop - start))
        return rows

    def bad(self, rows: Float[np.ndarray, "rows d_model"]) -> Bool[np.ndarray, " rows"]:
        """The mask of the bad rows. Without the sign, floats are ordered like their
        bits, with infinity and NaN last: one comparison finds all kinds."""
        whole = np.dtype(f"u{rows.dtype.itemsize}")
        signed = np.dtype(f"i{rows.dtype.itemsize}")
        sign = whole.type(1 << (8 * rows.dtype.itemsize - 1))
        limit = np.array(self._limit, rows.dtype).view(whole)[()]
        found = np.zeros(len(rows), bool)
        step = max(AT_ONCE_BYTES // max(rows.nbytes // max(len(rows), 1), 1), 1)
        for at in range(0, len(rows), step):
            bits = rows[at : at + step].view(whole)
            if bits.max() > (sign | limit) or bits.view(signed).max() > limit:
                found[at : at + step] = ((bits & ~sign) > limit).any(1)
        return found

    def survey(self, *, max_norm_multiple: float | None, stop: bool) -> LeftOut:
        """The rows to leave out, and the statistics without them. With `stop` a bad row
        is refused, otherwise it is left out."""
        m, found = self._activations.manifest, []
        total = np.array(m.mean) * m.n_rows
        squares, kept = m.mean_squared_norm * m.n_rows, m.n_rows
        step = max(AT_ONCE_BYTES * 16 // m.row_bytes, 1)
        bad_ones = 0
        with progress.bar(m.n_rows, unit="rows checked") as bar:
            for start in range(0, m.n_rows, step):
                end = min(start + step, m.n_rows)
                rows = (self.rows if stop else self._activations.view)(start, end)
                bad = self.bad(rows)
                bad_ones += int(bad.sum())
                if max_norm_multiple is not None:
                    bad |= self._massive(rows, max_norm_multiple)
                found.append(start + np.flatnonzero(bad))
                bar.update(len(rows))
        out = np.concatenate(found)
        if len(out):
            total, squares, kept = self._statistics(out, step)
        reasons = ["are NaN, infinite or giant"] if bad_ones else []
        if len(out) > bad_ones:
            reasons.append(f"have a norm above {max_norm_multiple:g} times the median")
        return LeftOut(out, total / kept, float(squares / kept), " or ".join(reasons))

    def _massive(
        self, rows: Float[np.ndarray, "rows d_model"], multiple: float
    ) -> Bool[np.ndarray, " rows"]:
        """The mask of rows with a norm above `multiple` medians."""
        with np.errstate(over="ignore", invalid="ignore"):
            norms = np.linalg.norm(rows.astype(np.float32), axis=1)
        return norms > multiple * self._median

    def _statistics(self, bad: np.ndarray, step: int) -> tuple[np.ndarray, float, int]:
        """Sum, sum of squares and number of the rows that are not bad. Computed from
        the rows again: what a giant added to a sum cannot be subtracted exactly."""
        m = self._activations.manifest
        total, squares = np.zeros(m.d_model), 0.0
        for start in range(0, m.n_rows, step):
            stop = min(start + step, m.n_rows)
            numbers = np.arange(start, stop)
            rows = self._activations.view(start, stop)[~np.isin(numbers, bad)]
            exact = rows.astype(np.float64)
            total += exact.sum(0)
            squares += float(np.einsum("ij,ij->", exact, exact))
        kept = m.n_rows - len(bad)
        if not kept:
            raise UserError(f"{self._activations.folder}: every row is bad")
        return total, squares, kept

    def _named(self, bad: np.ndarray, *, of: int) -> str:
        path, first = self._activations.located(int(bad[0]))
        return (
            f"{path}: {len(bad)} of {of} rows are NaN, infinite or have a value beyond "
            f"{self._limit:.4g} (--giant={self._giant:g} times the median norm); the "
            f"first is {first}; a new run with --bad_rows=skip leaves them out"
        )


def _median_norm(activations: Activations) -> tuple[float, float]:
    """The median norm of the first rows (0 where none is finite), and the largest
    number of the rows' dtype."""
    first = activations.view(0, min(_SAMPLE_ROWS, activations.n_rows))
    with np.errstate(over="ignore", invalid="ignore"):
        norms = np.linalg.norm(first.astype(np.float64), axis=1)
    norms = norms[np.isfinite(norms)]
    median = float(np.median(norms)) if len(norms) else 0.0
    return median, float(ml_dtypes.finfo(first.dtype).max)


@functools.lru_cache(maxsize=4)
def _left_out(
    folder: Path,
    manifest: str,
    giant: float,
    max_norm_multiple: float | None,
    stop: bool,
) -> LeftOut:
    """The survey of a folder with that manifest, made once for all arms."""
    check = Check(Activations.open(folder), giant=giant)
    return check.survey(max_norm_multiple=max_norm_multiple, stop=stop)


def left_out(
    activations: Activations,
    *,
    bad_rows: str,
    giant: float,
    max_norm_multiple: float | None = None,
) -> LeftOut | None:
    """The rows that a run leaves out of its activations, or None."""
    stop = bad_rows == "stop"
    if stop and max_norm_multiple is None:
        return None
    if isinstance(activations, GivenRows):
        check = Check(activations, giant=giant)
        found = check.survey(max_norm_multiple=max_norm_multiple, stop=stop)
    else:
        manifest, folder = activations.manifest.hash, activations.folder.absolute()
        found = _left_out(folder, manifest, giant, max_norm_multiple, stop)
    return found if len(found.rows) else None
