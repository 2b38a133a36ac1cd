"""The activation rows of the held-out contexts, with their tokens."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from vsae_jax.evals import Subject
from vsae_jax.system.errors import UserError


class HeldOut(NamedTuple):
    """The positions that count, in order.

    x: the language model's rows. token, before: the token there and the one before it
    (-1: none). context: the number of the context.
    """

    x: Float[np.ndarray, "rows d_model"]
    token: Int[np.ndarray, " rows"]
    before: Int[np.ndarray, " rows"]
    context: Int[np.ndarray, " rows"]


def check_counts(subject: Subject) -> None:
    """Refuses tokens of which none counts."""
    if not any(keep.any() for _, keep, _ in subject.batches()):
        raise UserError(
            "nothing to evaluate: every token is special or without an activation row; "
            "evaluate on more or other text"
        )


def held_out(subject: Subject) -> HeldOut:
    """One pass of the language model over a subject's tokens."""
    found: list[tuple[np.ndarray, ...]] = []
    contexts = 0
    for tokens, keep, count in subject.batches():
        values = jnp.asarray(subject.lm.at(tokens, [subject.reader.place])[0])
        x = np.asarray(subject.reader.rows(values))[keep.reshape(-1)]
        before = np.pad(tokens[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
        context = np.broadcast_to(
            contexts + np.arange(len(tokens))[:, None], tokens.shape
        )
        found.append((x, tokens[keep], before[keep], context[keep]))
        contexts += count
    return HeldOut(*(np.concatenate(part) for part in zip(*found, strict=True)))
