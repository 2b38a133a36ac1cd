"""Passes of a language model that are cut at a hook, spliced, and go on from there."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

import numpy as np
from jaxtyping import Array, Float, Int

from vsae_jax.config.sites import Hook, Site
from vsae_jax.system.errors import UserError

Tokens = Int[Array | np.ndarray, "batch time"]
Residual = Float[Array | np.ndarray, "batch time d_model"]
Logits = Float[Array | np.ndarray, "batch time vocab"]
Splice = Callable[[Any], Any]
Prompt = TypeVar("Prompt", str, Tokens)


def identity(residual: Residual) -> Residual:
    """The splice that changes nothing."""
    return residual


@runtime_checkable
class Traceable(Protocol):
    """What the JAX model has besides: it is a pytree, to be passed through `jax.jit` as
    an argument, and its methods are pure and have gradients, splices included."""

    @property
    def embedding(self) -> Float[Array, "vocab d_model"]:
        """What each token puts into the residual stream."""
        ...

    def at(
        self, tokens: Tokens, hooks: Sequence[Hook]
    ) -> list[Float[Array, "batch time d_model"]]: ...

    def at_from(
        self, x: Residual, hooks: Sequence[Hook]
    ) -> list[Float[Array, "batch time d_model"]]:
        """`at` where tokens put `x` into the stream: rows of `embedding`, or mixtures
        of them."""
        ...


class Cut(NamedTuple):
    """A forward pass that has reached a hook.

    value: what is there. rest: what else the backend needs to go on from there.
    """

    hook: Hook
    value: Residual
    rest: Any = None


class Losses(NamedTuple):
    """The losses of n residual streams, unreduced, in nats: the next-token loss, and
    KL(p_0 || p_i) of the next token's distribution from that of the first stream."""

    ce: Float[Array | np.ndarray, "n batch time-1"]
    kl: Float[Array | np.ndarray, "n batch time"]


def check_layer(layer: int, *, n_layers: int) -> int:
    """`layer`, if there is such a block."""
    if not 0 <= layer < n_layers:
        raise UserError(
            f"layer={layer} must be from 0 to {n_layers - 1}: "
            f"the model has {n_layers} blocks"
        )
    return layer


def splice_layer(
    layer: int | None,
    splices: Sequence[Splice],
    *,
    n_layers: int,
    site: Site = "resid_post",
) -> int:
    """The block of the splices: `layer`, or that of the `hook` which splices by an
    autoencoder have, or the last one where nothing is spliced. Refuses a splice that
    has a hook at another site."""
    hooks = {hook for s in splices if (hook := getattr(s, "hook", None)) is not None}
    for hook in hooks:
        if hook.site != site:
            raise UserError(
                f"the splice is by an autoencoder of {hook.name} and would be applied "
                f"at {site}; lm.logits and lm.loss take site={hook.site!r}, generate "
                "does not"
            )
    if layer is not None:
        return check_layer(layer, n_layers=n_layers)
    if len(hooks) == 1:
        return check_layer(hooks.pop().layer, n_layers=n_layers)
    if any(splice is not identity for splice in splices):
        raise ValueError("splices need a layer: the block whose residual they replace")
    return n_layers - 1


def apply_splice(splice: Splice, residual: Residual) -> Any:
    """`splice(residual)`, which must keep the shape."""
    # What a splice does to NumPy's array in place reaches no other splice.
    replaced = splice(
        np.array(residual) if isinstance(residual, np.ndarray) else residual
    )
    if np.shape(replaced) != residual.shape:
        raise ValueError(
            f"a splice returned the shape {np.shape(replaced)} for {residual.shape}"
        )
    return replaced
