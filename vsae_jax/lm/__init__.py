"""Language models as the rest of the library sees them: one protocol, two backends.

`neox.py` runs GPT-NeoX (all of Pythia) in JAX; `hf.py` runs any causal language
model through transformers and torch. Neither they nor transformers are imported
before a model is asked for.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from vsae_jax.lm.files import locate, read_config, read_vocab_size, tokenizer_source
from vsae_jax.system.errors import UserError, one_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Tokens = Int[Array | np.ndarray, "batch time"]
Residual = Float[Array | np.ndarray, "batch time d_model"]
Logits = Float[Array | np.ndarray, "batch time vocab"]
Splice = Callable[[Any], Any]


def identity(residual: Residual) -> Residual:
    """The splice that changes nothing."""
    return residual


@runtime_checkable
class LanguageModel(Protocol):
    """What extraction and evaluation need of a language model.

    A splice maps the residual stream `[batch, time, d_model]` after block `layer` to
    what the blocks above it see instead. The JAX model is a pytree whose methods are
    pure and may be called under `jax.jit`, splices included; the transformers model
    hands splices NumPy arrays and takes any array back.
    """

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
    def config_hash(self) -> str: ...

    @property
    def tokenizer_hash(self) -> str: ...

    def residual(self, tokens: Tokens, layer: int) -> Residual:
        """`blocks.{layer}.hook_resid_post` in float32; nothing above it is computed."""
        ...

    def logits(
        self,
        tokens: Tokens,
        *,
        layer: int | None = None,
        splices: Sequence[Splice] = (identity,),
    ) -> Sequence[Logits]:
        """The logits with each splice after block `layer`, a list as long as
        `splices`; lower blocks run once where the backend can do that."""
        ...

    def loss(
        self,
        tokens: Tokens,
        *,
        layer: int | None = None,
        splices: Sequence[Splice] = (identity,),
    ) -> Sequence[Float[Array, "batch time-1"]]:
        """`next_token_loss` of each of `logits`, without holding them all at once."""
        ...


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


def splice_layer(layer: int | None, splices: Sequence[Splice], *, n_layers: int) -> int:
    """The block that splices follow; the last one where nothing is spliced."""
    if layer is not None:
        return check_layer(layer, n_layers=n_layers)
    if any(splice is not identity for splice in splices):
        raise ValueError("splices need a layer: the block whose residual they replace")
    return n_layers - 1


def apply_splice(splice: Splice, residual: Residual) -> Any:
    """`splice(residual)`, which must keep the shape."""
    replaced = splice(residual)
    if np.shape(replaced) != residual.shape:
        raise ValueError(
            f"a splice returned the shape {np.shape(replaced)} for {residual.shape}"
        )
    return replaced


def load_language_model(
    model: str,
    *,
    revision: str | None = None,
    backend: Literal["transformers", "jax", "auto"] = "auto",
) -> LanguageModel:
    """The language model in a local folder or under a hub id.

    Args:
      model: local folder with config.json, tokenizer.json and model.safetensors, or a
        hub id.
      revision: branch, tag or commit of a hub id; unset is its default branch.
      backend: `auto` is jax for GPT-NeoX and transformers for every other family.
    """
    if backend not in ("transformers", "jax", "auto"):
        raise UserError(f"backend={backend!r} must be transformers, jax or auto")
    files = locate(model, revision=revision)
    family = read_config(files).get("model_type")
    if backend == "jax" and family != "gpt_neox":
        raise UserError(
            f"--backend=jax runs GPT-NeoX (Pythia) only and --model={model} is "
            f"{family!r}; use --backend=transformers"
        )
    if backend == "transformers" or family != "gpt_neox":
        from vsae_jax.lm.hf import load_hf

        return load_hf(files)
    from vsae_jax.lm.neox import load_neox

    return load_neox(files)


def load_tokenizer(
    model: str, *, revision: str | None = None
) -> "PreTrainedTokenizerBase":
    """The model's own tokenizer, checked against the model's vocabulary."""
    files = locate(model, revision=revision)
    source = tokenizer_source(files)
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(source.path, **source.arguments)
    except Exception as error:  # tokenizers raises nothing narrower
        raise UserError(
            f"the tokenizer of --model={model} cannot be read: {one_line(error)}"
        ) from None
    _check_vocabulary(tokenizer, model=model, vocab_size=read_vocab_size(files))
    return tokenizer


def _check_vocabulary(
    tokenizer: "PreTrainedTokenizerBase", *, model: str, vocab_size: int
) -> None:
    """Refuses a tokenizer with ids that the model does not know.

    Special tokens beyond the vocabulary are let pass: Gemma 3's 1B text model ships
    the image token of its larger sisters, and plain text does not produce them.
    """
    special = {i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
    largest = max(set(tokenizer.get_vocab().values()) - special, default=-1)
    if largest >= vocab_size:
        raise UserError(
            f"the tokenizer of --model={model} has ids up to {largest} but the model's "
            f"vocabulary is {vocab_size}: it belongs to another model and would "
            "scramble the text; put the model's own tokenizer files in its place"
        )
