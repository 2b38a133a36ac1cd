"""Schedules, and Adam with the decoder kept at unit norm, as one optax chain."""

from typing import Any

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

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
    """Gradient clipping, Adam, and for a unit-norm decoder both of its links: the
    gradient's part along each decoder row is removed before, and rows are brought
    back to norm 1 after (as dictionary_learning does). Numbers may be traced."""
    steps = [
        optax.clip_by_global_norm(clip_norm),
        optax.scale_by_adam(b1, b2, eps),
        optax.scale(-learning_rate),
    ]
    if unit_norm_decoder:
        steps = [tangent_decoder_gradient(), *steps, unit_norm_decoder_update()]
    return optax.chain(*steps)


def tangent_decoder_gradient() -> optax.GradientTransformation:
    """Removes from w_dec's gradient the component along each (unit) row."""

    def update(updates: Any, params: Any) -> Any:
        g, w = updates["w_dec"], params["w_dec"]
        along = jnp.sum(g * w, axis=1, keepdims=True)
        return {**updates, "w_dec": g - along * w}

    return optax.stateless(update)


def unit_norm_decoder_update() -> optax.GradientTransformation:
    """Changes w_dec's update so that the updated rows have norm 1. Goes last."""

    def update(updates: Any, params: Any) -> Any:
        w = params["w_dec"]
        moved = w + updates["w_dec"]
        norm = jnp.linalg.norm(moved, axis=1, keepdims=True)
        return {**updates, "w_dec": moved / jnp.maximum(norm, 1e-8) - w}

    return optax.stateless(update)
