"""Splices made from an autoencoder: what replaces a residual stream.

Each is a pure function of the residual stream `[batch, time, d_model]` after the
autoencoder's block, in units of raw activations. It treats every position by itself,
including BOS. `lm.logits(tokens, layer=, splices=[...])`, `lm.loss` and
`lm.generate(..., layer=, splice=)` take them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from vsae_jax.autoencoder.reader import Reader, jit_encode
from vsae_jax.config import Hook
from vsae_jax.runs import TrainedSAE
from vsae_jax.system.errors import UserError

Residual = Float[Array | np.ndarray, "batch time d_model"]
Splice = Callable[[Any], Any]


def reconstruct(sae: TrainedSAE) -> Splice:
    """x -> x_hat."""
    return _OfReader(sae.reader, partial(_reconstructed, sae.reader))


def ablate(sae: TrainedSAE, latents: int | Sequence[int]) -> Splice:
    """x -> x - sum of f_i d_i over the given latents, where d_i is what one unit of
    latent i adds to x. The other latents and the error x - x_hat stay, as in
    TransformerLens and SAELens with the error term."""
    reader, chosen = sae.reader, _in_range(sae.reader, latents)
    directions = jnp.asarray(reader.directions[chosen])
    return _OfReader(reader, partial(_without, reader, jnp.asarray(chosen), directions))


def steer(sae: TrainedSAE, latent: int, *, by: float) -> Splice:
    """x -> x + by d / |d|, where d is the latent's direction. `by` is a length in units
    of x, to be compared with the norms of the activations."""
    (direction,) = sae.reader.directions[_in_range(sae.reader, [latent])]
    step = jnp.asarray(by, jnp.float32) * (direction / np.linalg.norm(direction))
    return _OfReader(sae.reader, lambda residual: residual + step[None, None])


@dataclass(frozen=True, eq=False)
class _OfReader:
    """A splice, for a residual stream of the autoencoder's width only."""

    reader: Reader
    splice: Splice

    @property
    def hook(self) -> Hook | None:
        """Where the autoencoder reads, which the language model checks."""
        return self.reader.hook

    def __call__(self, residual: Residual) -> Residual:
        found, expected = residual.shape[-1], self.reader.config.d_model
        if found != expected:
            raise UserError(
                f"the autoencoder has d_model={expected} but the language model "
                f"{found}: it is of another model"
            )
        return self.splice(residual)


def _in_range(reader: Reader, latents: int | Sequence[int]) -> Int[np.ndarray, " n"]:
    chosen, d_sae = np.atleast_1d(np.asarray(latents)), reader.config.d_sae
    if chosen.ndim > 1 or not chosen.size or chosen.dtype.kind not in "iu":
        raise UserError(f"latents={latents} must be numbers of latents, as [3, 17]")
    for latent in chosen:
        if not 0 <= latent < d_sae:
            raise UserError(f"latent {latent} must be from 0 to {d_sae - 1}")
    return np.unique(chosen)


@jit_encode
def _reconstructed(
    reader: Reader, residual: Float[Array, "batch time d_model"]
) -> Float[Array, "batch time d_model"]:
    x = reader.rows(residual)
    x_hat = reader.decode(reader.encode(x), rows=x)
    # Add what centring subtracted.
    return x_hat.reshape(residual.shape) + (residual - x.reshape(residual.shape))


@jit_encode
def _without(
    reader: Reader,
    latents: Int[Array, " n"],
    directions: Float[Array, "n d_model"],
    residual: Float[Array, "batch time d_model"],
) -> Float[Array, "batch time d_model"]:
    x = reader.rows(residual)
    f = jnp.take(reader.encode(x), latents, axis=1)
    added = jnp.matmul(f, directions, precision=jax.lax.Precision.HIGHEST)
    return residual - (added * reader.row_scale(x)).reshape(residual.shape)
