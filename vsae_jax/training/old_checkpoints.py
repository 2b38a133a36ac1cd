"""Checkpoints of early vsae_jax 0.1, with one field for each penalty's sum."""

from typing import Any, NamedTuple

import jax.numpy as jnp

from vsae_jax.training.step import Totals, TrainState


class _Totals(NamedTuple):
    """The sums in the order in which they were written and hashed."""

    steps: Any
    loss: Any
    squared_error: Any
    variance: Any
    kl: Any
    l1: Any
    auxk: Any
    l0: Any
    bad_step: Any


def is_old(stored: Any) -> bool:
    """Whether the tree of a stored state is that of such a checkpoint."""
    return "sums" not in stored["totals"]


def as_old(like: TrainState) -> Any:
    """A state shaped `like`, as such a checkpoint stores it."""
    fields = dict.fromkeys(_Totals._fields, jnp.zeros(()))
    fields |= {"steps": jnp.int32(0), "bad_step": jnp.int32(-1)}
    return like._replace(totals=_Totals(**fields))  # pyright: ignore[reportArgumentType]


def as_new(state: Any, like: TrainState) -> TrainState:
    """A state that was read as `as_old(like)`, in today's form."""
    old = state.totals
    sums = {name: getattr(old, name) for name in like.totals.sums}
    return state._replace(totals=Totals(old.steps, old.bad_step, sums))
