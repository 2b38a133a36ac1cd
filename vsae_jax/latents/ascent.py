"""Soft tokens that climb the gradient of one latent, through the language model."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, Key

from vsae_jax.autoencoder.matmul import product
from vsae_jax.autoencoder.reader import Reader
from vsae_jax.lm import Traceable


class Schedule(NamedTuple):
    """Adam's learning rate for the logits, and the softmax's first and last
    temperature."""

    lr: float
    hot: float
    cold: float


class Climb(NamedTuple):
    """The ends of ascents: the rounded tokens, BOS included, and the latent's
    pre-activation at the last position for the soft tokens before rounding."""

    tokens: Int[Array, "restarts time"]
    soft: Float[Array, " restarts"]


@partial(jax.jit, static_argnames=("bos_id", "length", "steps"))
def climb(
    lm: Traceable,
    reader: Reader,
    latent: Int[Array, ""],
    keys: Key[Array, " restarts"],
    allowed: Bool[Array, " vocab"],
    schedule: Schedule,
    *,
    bos_id: int | None,
    length: int,
    steps: int,
) -> Climb:
    """One ascent for each key, all at once.

        p = softmax(logits / T),   x_0 = [embed(BOS), p @ W_E]
        maximise mu_latent(rows(x_0) at the last position) over the logits

    mu is taken before the relu and the selection, which have no gradient where the
    latent is off. Adam climbs while T falls geometrically, so that at the end a soft
    token is nearly the token that it is rounded to. Tokens that are not `allowed` have
    no probability. `bos_id` is put at position 0, unless it is None. The keys are
    consumed.
    """
    objective = partial(_objective, lm, reader, latent, allowed, bos_id)

    def ascend(key: Key[Array, ""]) -> Climb:
        logits = jax.random.normal(key, (length, len(allowed)))
        adam = optax.adam(schedule.lr)

        def step(state: Any, done: Float[Array, ""]) -> tuple[Any, None]:
            logits, moments = state
            temperature = schedule.hot * (schedule.cold / schedule.hot) ** done
            gradient = jax.grad(objective)(logits, temperature)
            update, moments = adam.update(-gradient, moments)
            return (optax.apply_updates(logits, update), moments), None

        state, done = (logits, adam.init(logits)), jnp.linspace(0.0, 1.0, steps)
        (logits, _), _ = jax.lax.scan(step, state, done)
        tokens = jnp.argmax(jnp.where(allowed[None, :], logits, -jnp.inf), axis=-1)
        if bos_id is not None:
            tokens = jnp.concatenate([jnp.array([bos_id]), tokens])
        return Climb(tokens, objective(logits, jnp.asarray(schedule.cold)))

    return jax.vmap(ascend)(keys)


def _objective(
    lm: Traceable,
    reader: Reader,
    latent: Int[Array, ""],
    allowed: Bool[Array, " vocab"],
    bos_id: int | None,
    logits: Float[Array, "length vocab"],
    temperature: Float[Array, ""],
) -> Float[Array, ""]:
    """The latent's pre-activation at the last position."""
    scaled = jnp.where(allowed[None, :], logits / temperature, -jnp.inf)
    table = lm.embedding
    x = product(jax.nn.softmax(scaled, axis=-1), table)
    if bos_id is not None:
        x = jnp.concatenate([table[bos_id][None, :], x])
    last = lm.at_from(x[None], [reader.place])[0][:, -1:]
    return reader.pre_activations(reader.rows(last))[0, latent]
