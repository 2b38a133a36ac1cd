"""The reconstruction metrics, and the sums over tokens that they are made from.

Sums are float32 within a batch and float64 across batches, and respect a mask, so that
results do not depend on the batch size. Two results do, because SAEBench 0.6 averages
over batches: `explained_variance_saebench` and `explained_variance_legacy`. `mse` and
`l1` are SAEBench's only on request: theirs are per batch, and signed.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from vsae_jax.autoencoder.density import density_metrics
from vsae_jax.system.errors import UserError


class BatchSums(NamedTuple):
    """Sums over a batch's kept tokens, named after what they sum.

    error: ||x - x_hat||^2; error_d: the same by dimension. spread_d: squared distances
    from the batch's mean, by dimension. ordinary_...: over rows with a norm up to a
    limit. fired: how often each latent was above 0. legacy: 1 - ||x - x_hat||^2 /
    ||x - mean of the batch||^2.
    """

    tokens: Float[Array, ""]
    error: Float[Array, ""]
    squared_norm: Float[Array, ""]
    x: Float[Array, " d_model"]
    cosine: Float[Array, ""]
    norm_in: Float[Array, ""]
    norm_out: Float[Array, ""]
    norm_ratio: Float[Array, ""]
    l0: Float[Array, ""]
    l1: Float[Array, ""]
    signed_l1: Float[Array, ""]
    dot: Float[Array, ""]
    squared_out: Float[Array, ""]
    legacy: Float[Array, ""]
    fired: Float[Array, " d_sae"]
    error_d: Float[Array, " d_model"]
    spread_d: Float[Array, " d_model"]
    ordinary_tokens: Float[Array, ""]
    ordinary_error: Float[Array, ""]
    ordinary_squared_norm: Float[Array, ""]
    ordinary_x: Float[Array, " d_model"]


@jax.jit
def batch_sums(
    x: Float[Array, "tokens d_model"],
    x_hat: Float[Array, "tokens d_model"],
    f: Float[Array, "tokens d_sae"],
    keep: Bool[Array, " tokens"],
    limit: Float[Array, ""] | float = math.inf,
) -> BatchSums:
    """The sums over the tokens where `keep` holds; the others do not matter. Rows with
    a norm up to `limit` are ordinary."""

    def total(values: Array, of: Array = keep) -> Array:
        # A product with the mask would keep NaN, and a GPU would round it to TF32.
        where = of.reshape(-1, *(1,) * (values.ndim - 1))
        return jnp.sum(values, axis=0, where=where, dtype=jnp.float32)

    n = total(keep)
    error = jnp.sum(jnp.square(x - x_hat), axis=-1)
    norm_in = jnp.linalg.norm(x, axis=-1)
    ordinary = keep & (norm_in <= limit)
    norm_out = jnp.linalg.norm(x_hat, axis=-1)
    dot = jnp.sum(x * x_hat, axis=-1)
    center = total(x) / jnp.maximum(n, 1.0)
    spread = jnp.sum(jnp.square(x - center[None, :]), axis=-1)
    return BatchSums(
        tokens=n,
        error=total(error),
        squared_norm=total(jnp.square(norm_in)),
        x=total(x),
        cosine=total(dot / jnp.maximum(norm_in * norm_out, 1e-12)),
        norm_in=total(norm_in),
        norm_out=total(norm_out),
        norm_ratio=total(norm_out / jnp.where(norm_in < 1e-4, 1.0, norm_in)),
        l0=total(jnp.sum(f != 0, axis=-1)),
        l1=total(jnp.sum(jnp.abs(f), axis=-1)),
        signed_l1=total(jnp.sum(f, axis=-1)),
        dot=total(dot),
        squared_out=total(jnp.square(norm_out)),
        legacy=total(1 - error / jnp.maximum(spread, 1e-12)),
        fired=total(f > 0),
        error_d=total(jnp.square(x - x_hat)),
        spread_d=total(jnp.square(x - center[None, :])),
        ordinary_tokens=total(ordinary),
        ordinary_error=total(error, ordinary),
        ordinary_squared_norm=total(jnp.square(norm_in), ordinary),
        ordinary_x=total(x, ordinary),
    )


class Reconstruction:
    """Adds up batches and gives the metrics of all tokens seen."""

    def __init__(self) -> None:
        self._sums: dict[str, Any] = {}
        self._batch_means: list[tuple[float, float, float]] = []

    def add(self, sums: BatchSums) -> None:
        """Adds one batch; a batch without kept tokens changes nothing."""
        host = {n: np.asarray(v, np.float64) for n, v in sums._asdict().items()}
        n = float(host["tokens"])
        if n == 0:
            return
        error, squares = float(host["error"]), float(host["squared_norm"])
        # In float64: a large mean would hide a small variance.
        host["squared_d"] = host.pop("spread_d") + np.square(host["x"]) / n
        bias = ratio(float(host["squared_out"]), float(host["dot"]))
        self._batch_means.append((error / n, squares / n, bias or 0.0))
        self._sums = {k: self._sums.get(k, 0.0) + v for k, v in host.items()}

    @property
    def density(self) -> Float[np.ndarray, " d_sae"]:
        """The share of tokens on which each latent is above 0."""
        return self._sums["fired"] / self._sums["tokens"]

    @property
    def fired(self) -> Float[np.ndarray, " d_sae"]:
        """The number of tokens on which each latent is above 0."""
        return self._sums["fired"]

    def metrics(
        self, *, mean_in_variance: bool = False, batch_sums: bool = False
    ) -> dict[str, float | None]:
        """Every number of docs/saebench.md 1.4; None where it is not defined, such as
        the explained variance of rows that are all the same.

        Args:
          mean_in_variance: `explained_variance` is SAEBench's, with the mean kept in.
          batch_sums: `mse`, `l1` and the bias are SAEBench's, by batches and signed.
        """
        if not self._sums:
            raise UserError("every token is special or has no row: nothing to measure")
        s, n = self._sums, float(self._sums["tokens"])
        d_model = len(s["x"])
        r, m, bias = (float(mean) for mean in np.mean(self._batch_means, axis=0))
        squares = float(s["squared_norm"])
        explained = _explained(float(s["error"]), _variance(squares, s["x"], n))
        # The mean is not removed: a bug of theirs (docs/saebench.md 1.4).
        saebench = _explained(r, m - (m / d_model) ** 2)
        mse = float(s["error"]) / n / d_model
        if batch_sums:
            mse = r * len(self._batch_means) / n
        else:
            bias = ratio(float(s["squared_out"]), float(s["dot"]))
        return {
            "explained_variance": saebench if mean_in_variance else explained,
            "explained_variance_saebench": saebench,
            "explained_variance_legacy": float(s["legacy"]) / n,
            "explained_variance_standardised": self._standardised(),
            "explained_variance_ordinary_rows": self._of_ordinary_rows(),
            "share_ordinary_rows": float(s["ordinary_tokens"]) / n,
            "mse": mse,
            "relative_reconstruction_bias": bias,
            "cossim": float(s["cosine"]) / n,
            "l2_norm_in": float(s["norm_in"]) / n,
            "l2_norm_out": float(s["norm_out"]) / n,
            "l2_ratio": float(s["norm_ratio"]) / n,
            "l0": float(s["l0"]) / n,
            "l1": float(s["signed_l1" if batch_sums else "l1"]) / n,
        } | density_metrics(self.density)

    def _standardised(self) -> float | None:
        """1 - the mean over dimensions of error / variance. Every dimension counts the
        same, where `explained_variance` weighs them by their variance. Dimensions that
        do not vary are left out."""
        s, n = self._sums, float(self._sums["tokens"])
        variance = s["squared_d"] - np.square(s["x"]) / n
        varies = variance > 1e-6 * s["squared_d"]
        if not varies.any():
            return None
        return 1 - float(np.mean(s["error_d"][varies] / variance[varies]))

    def _of_ordinary_rows(self) -> float | None:
        """The explained variance of the ordinary rows among themselves."""
        s, n = self._sums, float(self._sums["ordinary_tokens"])
        if not n:
            return None
        squares = float(s["ordinary_squared_norm"])
        variance = _variance(squares, s["ordinary_x"], n)
        return _explained(float(s["ordinary_error"]), variance)


def _variance(squares: float, x: Float[np.ndarray, " d_model"], n: float) -> float:
    """The summed squared distances from the mean, from sums over n rows."""
    variance = squares - float(np.sum(np.square(x))) / n
    # With equal rows, float32's rounding leaves a variance that is not 0.
    return 0.0 if variance < 1e-6 * squares else variance


def ratio(a: float, b: float) -> float | None:
    """a / b; None where b is 0."""
    return a / b if b else None


def _explained(error: float, variance: float) -> float | None:
    unexplained = ratio(error, variance)
    return None if unexplained is None else 1 - unexplained
