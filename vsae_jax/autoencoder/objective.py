"""The objective: the squared error and the weighted penalties of one batch.

loss = mean(squared_error) + sum over sorted names of weight[name] * mean(penalty)
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from vsae_jax.autoencoder import sae
from vsae_jax.autoencoder.arrays import Rows
from vsae_jax.autoencoder.matmul import column_counts
from vsae_jax.autoencoder.penalties import (
    PENALTIES,
    Batch,
    penalties_of,
    row_variance,
    squared_error,
)
from vsae_jax.autoencoder.sparsifiers import Numbers
from vsae_jax.config import SAEConfig


class Info(NamedTuple):
    """What is recorded of a batch: the means of the loss's parts, and what fired.

    `variance` is the mean of sum_d (x - mean_batch x)^2, so that the batch's explained
    variance is 1 - squared_error / variance. `penalties` are unweighted means of those
    that the config has; `buffers` are the sparsifier's after this batch.
    """

    loss: Float[Array, ""]
    squared_error: Float[Array, ""]
    variance: Float[Array, ""]
    l0: Float[Array, ""]
    penalties: dict[str, Float[Array, ""]]
    fired: Bool[Array, " d_sae"]
    buffers: dict[str, Array]


def total_loss(
    params: Mapping[str, Array],
    x: Rows,
    key: Key[Array, ""] | None,
    numbers: Numbers,
    dead: Bool[Array, " d_sae"] | None = None,
    *,
    config: SAEConfig,
    first_row: int | Int[Array, ""] = 0,
    buffers: Mapping[str, Array] | None = None,
) -> tuple[Float[Array, ""], Info]:
    """The loss, from the parts that `config` switches on, and an `Info` of them.

    `x` is normalised. `numbers` holds k, noise_std and the weight of each penalty by
    the names of their flags; they may be traced. `key` is consumed, but not used where
    `config.noise` is False. `dead` are the latents that AuxK may use. `first_row` and
    `buffers` are as in `sae.forward`.
    """
    out = sae.forward(
        params,
        x,
        numbers,
        config=config,
        key=key if config.noise else None,
        first_row=first_row,
        buffers=buffers,
    )
    error = jnp.mean(squared_error(x, out.x_hat_n))
    loss, means = error, {}
    for name in penalties_of(config):
        part = PENALTIES[name].of(Batch(params, x, out, dead), config)
        means[name] = jnp.zeros(()) if part is None else jnp.mean(part)
        if part is not None:
            loss = loss + numbers[PENALTIES[name].weight] * means[name]
    return loss, Info(
        loss=loss,
        squared_error=error,
        variance=row_variance(x),
        l0=jnp.mean(jnp.sum(out.f != 0, axis=-1, dtype=jnp.int32)),
        penalties=means,
        fired=column_counts(out.f > 0) > 0,
        buffers=out.buffers,
    )
