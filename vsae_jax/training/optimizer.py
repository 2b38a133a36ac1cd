"""Schedules, and Adam with the decoder kept at unit norm."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from vsae_jax.autoencoder.penalties import PENALTIES
from vsae_jax.config import SAEConfig
from vsae_jax.training.layout import DECODER

Scalar = Float[Array, ""] | Int[Array, ""] | float | int


def learning_rate(
    step: Scalar, *, peak: Scalar, warmup: Scalar, decay_start: Scalar, steps: Scalar
) -> Float[Array, ""]:
    """peak, with a linear rise over `warmup` steps and a linear fall to 0 from
    `decay_start` to `steps`."""
    rise = jnp.minimum((step + 1) / jnp.maximum(warmup, 1), 1.0)
    fall = (steps - step) / jnp.maximum(steps - decay_start, 1)
    return peak * rise * jnp.clip(fall, 0.0, 1.0)


def kl_weight(step: Scalar, *, beta: Scalar, warmup: Scalar) -> Float[Array, ""]:
    """beta(t): a linear rise from 0 over `warmup` steps, then beta (KL annealing)."""
    rise = jnp.minimum(step / jnp.maximum(warmup, 1), 1.0)
    return beta * jnp.where(warmup > 0, rise, 1.0)


def adam(
    *,
    learning_rate: Scalar = 0.0,
    clip_norm: Scalar = 1.0,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    unit_norm_decoder: bool = True,
) -> optax.GradientTransformation:
    """Gradient clipping, then Adam. For a unit-norm decoder, the gradient's part along
    each decoder row is removed first (as in dictionary_learning; `layout.normed` is the
    other half). Numbers may be traced."""
    steps = [
        clip_by_global_norm(clip_norm),
        optax.scale_by_adam(b1, b2, eps),
        optax.scale(-learning_rate),
    ]
    if unit_norm_decoder:
        steps = [tangent_decoder_gradient(), *steps]
    return optax.chain(*steps)


def rate_of_step(step: Scalar, numbers: Mapping[str, Any]) -> Float[Array, ""]:
    """The learning rate at `step`, from the numbers of a run."""
    return learning_rate(
        step,
        peak=numbers["lr"],
        warmup=numbers["lr_warmup_steps"],
        decay_start=numbers["lr_decay_start"],
        steps=numbers["steps"],
    )


def beta_of_step(step: Scalar, numbers: Mapping[str, Any]) -> Float[Array, ""]:
    """The weight of the KL at `step`, from the numbers of a run."""
    return kl_weight(step, beta=numbers["beta"], warmup=numbers["kl_warmup_steps"])


def warmed(step: Scalar, numbers: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers at `step`: some penalties' weights rise as the KL's does."""
    rising = [penalty.weight for penalty in PENALTIES.values() if penalty.warms]
    warmup = numbers["kl_warmup_steps"]
    return {
        **numbers,
        **{n: kl_weight(step, beta=numbers[n], warmup=warmup) for n in rising},
    }


def of_step(
    step: Scalar, numbers: Mapping[str, Any], config: SAEConfig
) -> optax.GradientTransformation:
    """`adam` with the numbers of a run at `step`."""
    return adam(
        learning_rate=rate_of_step(step, numbers),
        clip_norm=numbers["clip_norm"],
        b1=numbers["adam_b1"],
        b2=numbers["adam_b2"],
        eps=numbers["adam_eps"],
        unit_norm_decoder=config.decoder_norm == "unit",
    )


def clip_by_global_norm(max_norm: Scalar) -> optax.GradientTransformation:
    """optax's, but as a product with one factor, which XLA fuses into the gradient's
    use; a quotient would be stored."""

    def update(updates: Any, params: Any) -> Any:
        del params
        factor = jnp.minimum(1.0, max_norm / optax.tree.norm(updates))
        return jax.tree.map(lambda g: factor * g, updates)

    return optax.stateless(update)


def tangent_decoder_gradient() -> optax.GradientTransformation:
    """Removes from w_dec_t's gradient the component along each (unit) column."""

    def update(updates: Any, params: Any) -> Any:
        g, w = updates[DECODER], params[DECODER]
        along = jnp.sum(g * w, axis=0, keepdims=True)
        return {**updates, DECODER: g - along * w}

    return optax.stateless(update)
