"""Soft tokens that climb the gradient of one latent, through the language model."""

import dataclasses
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, Key

from vsae_jax.autoencoder import sae
from vsae_jax.autoencoder.layer_norm import normalise_rows
from vsae_jax.autoencoder.sae import Variables
from vsae_jax.config import SAEConfig
from vsae_jax.evals.encoding import rows_of
from vsae_jax.lm.neox import NeoX


@dataclass(frozen=True)
class Reading:
    """How an autoencoder reads the residual stream after block `layer`.

    center: the mean of each row is subtracted; layer_norm: rows are normalised;
    bos_id: what stands at position 0 of every context, None where nothing does.
    """

    config: SAEConfig
    layer: int
    center: bool
    layer_norm: bool
    bos_id: int | None

    def rows(
        self, residual: Float[Array, "batch time d_model"]
    ) -> Float[Array, "rows d_model"]:
        """The rows that the autoencoder was trained on, `batch * time` of them."""
        x = rows_of(residual, center=self.center)
        return normalise_rows(x)[0] if self.layer_norm else x


class Schedule(NamedTuple):
    """Adam's rate on the logits, and the softmax's temperature at both ends."""

    lr: float
    hot: float
    cold: float


class Climb(NamedTuple):
    """Where ascents ended: the rounded tokens, BOS included, and the latent's
    pre-activation at the last position for the soft tokens that were rounded."""

    tokens: Int[Array, "restarts time"]
    soft: Float[Array, " restarts"]


@partial(jax.jit, static_argnames=("reading", "length", "steps"))
def climb(
    lm: NeoX,
    variables: Variables,
    latent: Int[Array, ""],
    keys: Key[Array, " restarts"],
    allowed: Bool[Array, " vocab"],
    schedule: Schedule,
    *,
    reading: Reading,
    length: int,
    steps: int,
) -> Climb:
    """One ascent for each key, all at once.

        p = softmax(logits / T),   x_0 = [embed(BOS), p @ W_E]
        maximise mu_latent(residual(x_0) at the last position) over the logits

    mu is before the relu and the selection, which have no gradient where the latent is
    off. By Adam, T falling geometrically, so that at the end a soft token is nearly the
    token it is rounded to. Tokens not `allowed` have none. The keys are consumed.
    """
    objective = partial(_objective, lm, variables, latent, allowed, reading)

    def ascend(key: Key[Array, ""]) -> Climb:
        logits = jax.random.normal(key, (length, len(allowed)))
        adam = optax.adam(schedule.lr)

        def step(state: Any, done: Float[Array, ""]) -> tuple[Any, None]:
            logits, moments = state
            gradient = jax.grad(objective)(logits, _temperature(schedule, done))
            update, moments = adam.update(-gradient, moments)
            return (optax.apply_updates(logits, update), moments), None

        state, done = (logits, adam.init(logits)), jnp.linspace(0.0, 1.0, steps)
        (logits, _), _ = jax.lax.scan(step, state, done)
        tokens = jnp.argmax(jnp.where(allowed[None, :], logits, -jnp.inf), axis=-1)
        if reading.bos_id is not None:
            tokens = jnp.concatenate([jnp.array([reading.bos_id]), tokens])
        return Climb(tokens, objective(logits, jnp.asarray(schedule.cold)))

    return jax.vmap(ascend)(keys)


def _temperature(schedule: Schedule, done: Float[Array, ""]) -> Float[Array, ""]:
    return schedule.hot * (schedule.cold / schedule.hot) ** done


def _objective(
    lm: NeoX,
    variables: Variables,
    latent: Int[Array, ""],
    allowed: Bool[Array, " vocab"],
    reading: Reading,
    logits: Float[Array, "length vocab"],
    temperature: Float[Array, ""],
) -> Float[Array, ""]:
    """The latent's pre-activation at the last position."""
    scaled = jnp.where(allowed[None, :], logits / temperature, -jnp.inf)
    table = lm.params["embed"]
    x = jax.nn.softmax(scaled, axis=-1) @ table
    if reading.bos_id is not None:
        x = jnp.concatenate([table[reading.bos_id][None, :], x])
    last = lm.residual_from(x[None], reading.layer)[:, -1:]
    return pre_activations(variables, last, reading=reading)[0, latent]


def pre_activations(
    variables: Variables,
    residual: Float[Array, "batch time d_model"],
    *,
    reading: Reading,
) -> Float[Array, "rows d_sae"]:
    """mu of every latent before the relu, if any: `batch * time` rows."""
    config = dataclasses.replace(reading.config, relu=False)
    return sae.pre_activations(variables, reading.rows(residual), config=config)
