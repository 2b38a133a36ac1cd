"""What extraction and evaluation ask of a language model, whatever runs it."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from vsae_jax.config.sites import Hook, Site
from vsae_jax.lm.files import ModelFiles
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
class LanguageModel(Protocol):
    """What extraction and evaluation need of a language model.

    A splice maps what is at a site of block `layer`, `[batch, time, d_model]`, to what
    replaces it; a site is the residual stream after the block, or what its attention or
    its MLP adds to the stream. The transformers model hands splices NumPy arrays and
    takes any array back; for the JAX model see `Traceable`.
    """

    @property
    def files(self) -> ModelFiles:
        """Where it was read from; its tokenizer is there, too."""
        ...

    @property
    def name(self) -> str:
        """The hub id or the local folder, as the user gave it."""
        ...

    @property
    def revision(self) -> str | None:
        """The hub commit that was loaded; None for a local folder."""
        ...

    @property
    def d_model(self) -> int: ...

    @property
    def n_layers(self) -> int: ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def max_positions(self) -> int | None:
        """The longest context the model was made for; None where it does not say."""
        ...

    @property
    def bos_id(self) -> int:
        """What starts a context: BOS, or EOS where the model has no BOS."""
        ...

    @property
    def special_ids(self) -> frozenset[int]:
        """The ids of BOS, EOS and padding, those that exist."""
        ...

    @property
    def dtype(self) -> str:
        """The dtype of products' operands, float32 or bfloat16; sums are float32."""
        ...

    @property
    def config_hash(self) -> str: ...

    @property
    def tokenizer_hash(self) -> str: ...

    def residual(self, tokens: Tokens, layer: int) -> Residual:
        """`blocks.{layer}.hook_resid_post` in float32; nothing above it is computed."""
        ...

    def check(self, hook: Hook) -> None:
        """Refuses a hook that the model does not have, with a UserError."""
        ...

    def at(self, tokens: Tokens, hooks: Sequence[Hook]) -> Sequence[Residual]:
        """What is at each hook, in float32, from one pass that ends at the last."""
        ...

    def cut(self, tokens: Tokens, hook: Hook) -> "Cut":
        """The pass up to a hook."""
        ...

    def joined(self, cut: "Cut", values: Sequence[Residual]) -> Sequence[Residual]:
        """The residual stream after the hook's block where each of `values` is at the
        hook, for `logits_from` and `losses_from`."""
        ...

    def logits(
        self,
        tokens: Tokens,
        *,
        layer: int | None = None,
        site: Site = "resid_post",
        splices: Sequence[Splice] = (identity,),
    ) -> Sequence[Logits]:
        """The logits with each splice at a site of block `layer`, one set a splice;
        what is below runs once."""
        ...

    def loss(
        self,
        tokens: Tokens,
        *,
        layer: int | None = None,
        site: Site = "resid_post",
        splices: Sequence[Splice] = (identity,),
    ) -> Sequence[Float[Array | np.ndarray, "batch time-1"]]:
        """`next_token_loss` of each of `logits`, without holding them all at once."""
        ...

    def logits_from(self, residual: Residual, layer: int) -> Logits:
        """The logits where the residual stream after block `layer` is `residual`; only
        what is above the block is computed."""
        ...

    def losses_from(
        self,
        residuals: Sequence[Residual],
        layer: int,
        tokens: Tokens,
        *,
        underflow: bool = False,
    ) -> "Losses":
        """The losses where the residual stream after block `layer` is each of
        `residuals`, and KL from the first; never are all logits in memory at once.

        underflow: log p is the log of a softmax, which can be -inf.
        """
        ...

    def cached(
        self,
        *,
        batch: int,
        length: int,
        layer: int | None = None,
        splice: Splice = identity,
    ) -> Callable[[Tokens], Float[Array | np.ndarray, "batch vocab"]]:
        """A function that takes the next tokens `[batch, time]` of `batch` contexts (in
        its first call the first ones) and returns the logits after the last of them. It
        keeps the keys and values of up to `length` positions, so that no token runs
        twice; `splice` sees only the new positions."""
        ...

    def tokenize(
        self, texts: str | Sequence[str], *, bos: bool = True
    ) -> Int[np.ndarray, "texts time"]: ...

    def decode(self, tokens: Tokens) -> list[str]: ...

    def generate(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: int = 32,
        layer: int | None = None,
        splice: Splice = identity,
        temperature: float = 0.0,
        key: Key[Array, ""] | None = None,
    ) -> Prompt:
        """What the model writes after a prompt, text or tokens, see `Attached`."""
        ...


@runtime_checkable
class Traceable(LanguageModel, Protocol):
    """The JAX model: a pytree, to be passed through `jax.jit` as an argument, whose
    methods are pure and have gradients, splices included."""

    @property
    def embedding(self) -> Float[Array, "vocab d_model"]:
        """What each token puts into the residual stream."""
        ...

    def residual(
        self, tokens: Tokens, layer: int
    ) -> Float[Array, "batch time d_model"]: ...

    def at(
        self, tokens: Tokens, hooks: Sequence[Hook]
    ) -> list[Float[Array, "batch time d_model"]]: ...

    def residual_from(
        self, x: Residual, layer: int
    ) -> Float[Array, "batch time d_model"]:
        """The residual stream after block `layer` where tokens put `x` into it: rows
        of `embedding`, or mixtures of them."""
        ...

    def at_from(
        self, x: Residual, hooks: Sequence[Hook]
    ) -> list[Float[Array, "batch time d_model"]]:
        """`at` where tokens put `x` into the stream."""
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


@jax.jit
def next_token_loss(logits: Logits, tokens: Tokens) -> Float[Array, "batch time-1"]:
    """loss_t = -log softmax(logits_t)[token_{t+1}], unreduced, in nats."""
    logits = logits[:, :-1]
    picked = jnp.take_along_axis(logits, tokens[:, 1:, None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - picked


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
    """The block of the splices; the last one where nothing is spliced. Refuses a splice
    that has a `hook` at another site."""
    for splice in splices:
        hook = getattr(splice, "hook", None)
        if hook is not None and hook.site != site:
            raise UserError(
                f"the splice is by an autoencoder of {hook.name} and would be applied "
                f"at {site}; lm.logits and lm.loss take site={hook.site!r}, generate "
                "does not"
            )
    if layer is not None:
        return check_layer(layer, n_layers=n_layers)
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
