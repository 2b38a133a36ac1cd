"""A language model as the rest of the library sees it, whatever runs it."""

import abc
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jaxtyping import Array, Float, Int, Key

from vsae_jax.config.sites import Hook, Site
from vsae_jax.lm.files import ModelFacts, generation_eos_ids
from vsae_jax.lm.passes import (
    Cut,
    Logits,
    Losses,
    Prompt,
    Residual,
    Splice,
    Tokens,
    apply_splice,
    identity,
    splice_layer,
)
from vsae_jax.lm.tokenizer import encode, load_tokenizer
from vsae_jax.system.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Room for keys and values is rounded up to a multiple of this, so that prompts of
# different lengths share one compiled program.
_ROOM = 128


class LanguageModel(ModelFacts, abc.ABC):
    """A language model. A backend is a subclass with the abstract methods.

    A splice maps what is at a site of block `layer`, `[batch, time, d_model]`, to what
    replaces it; a site is the residual stream after the block, or what its attention or
    its MLP adds to the stream. The transformers model hands splices NumPy arrays and
    takes any array back; for the JAX model see `Traceable`.
    """

    @abc.abstractmethod
    def check(self, hook: Hook) -> None:
        """Refuses a hook that the model does not have, with a UserError."""

    @abc.abstractmethod
    def at(self, tokens: Tokens, hooks: Sequence[Hook]) -> Sequence[Residual]:
        """What is at each hook, in float32, from one pass that ends at the last."""

    @abc.abstractmethod
    def cut(self, tokens: Tokens, hook: Hook) -> Cut:
        """The pass up to a hook."""

    @abc.abstractmethod
    def joined(self, cut: Cut, values: Sequence[Residual]) -> Sequence[Residual]:
        """The residual stream after the hook's block where each of `values` is at the
        hook, for `logits_from` and `losses_from`."""

    @abc.abstractmethod
    def logits_from(self, residual: Residual, layer: int) -> Logits:
        """The logits where the residual stream after block `layer` is `residual`; only
        what is above the block is computed."""

    @abc.abstractmethod
    def losses_from(
        self,
        residuals: Sequence[Residual],
        layer: int,
        tokens: Tokens,
        *,
        underflow: bool = False,
    ) -> Losses:
        """The losses where the residual stream after block `layer` is each of
        `residuals`, and KL from the first; never are all logits in memory at once.

        underflow: log p is the log of a softmax, which can be -inf.
        """

    @abc.abstractmethod
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

    def residual(self, tokens: Tokens, layer: int) -> Residual:
        """The residual stream after block `layer`, in float32; the pass ends there."""
        return self.at(tokens, [Hook(layer)])[0]

    def logits(
        self,
        tokens: Tokens,
        *,
        layer: int | None = None,
        site: Site = "resid_post",
        splices: Sequence[Splice] = (identity,),
    ) -> list[Logits]:
        """The logits with each splice at a site of block `layer`, one set a splice;
        what is below runs once."""
        layer = splice_layer(layer, splices, n_layers=self.n_layers, site=site)
        streams = self._spliced(tokens, Hook(layer, site), splices)
        return [self.logits_from(stream, layer) for stream in streams]

    def loss(
        self,
        tokens: Tokens,
        *,
        layer: int | None = None,
        site: Site = "resid_post",
        splices: Sequence[Splice] = (identity,),
    ) -> list[Float[Array | np.ndarray, "batch time-1"]]:
        """The next-token loss of each of `logits`, without holding them all at once."""
        layer = splice_layer(layer, splices, n_layers=self.n_layers, site=site)
        streams = self._spliced(tokens, Hook(layer, site), splices)
        return [self.losses_from([x], layer, tokens).ce[0] for x in streams]

    def _spliced(
        self, tokens: Tokens, hook: Hook, splices: Sequence[Splice]
    ) -> Iterator[Residual]:
        """The stream after the hook's block with each splice."""
        if isinstance(tokens, str) or (len(tokens) and isinstance(tokens[0], str)):
            raise UserError("tokens are text: give lm.tokenize(text)")
        cut = self.cut(tokens, hook)
        for splice in splices:
            yield self.joined(cut, [apply_splice(splice, cut.value)])[0]

    @functools.cached_property
    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """transformers' tokenizer, for chat templates and the like."""
        return load_tokenizer(self.files)

    def tokenize(
        self, texts: str | Sequence[str], *, bos: bool = True
    ) -> Int[np.ndarray, "texts time"]:
        """The ids of one text or of several, each after BOS.

        Shorter texts are padded with `bos_id` at their end, which changes nothing
        before it. Text that spells a special token stays text.
        """
        texts = [texts] if isinstance(texts, str) else list(texts)
        first = [self.bos_id] if bos else []
        rows = [first + ids for ids in encode(texts, self.tokenizer)]
        longest = max(map(len, rows), default=0)
        fill = self.bos_id
        filled = [ids + [fill] * (longest - len(ids)) for ids in rows]
        return np.array(filled, np.int32).reshape(len(rows), longest)

    def decode(self, tokens: Tokens) -> list[str]:
        """The texts of ids `[texts, time]`, special tokens left out."""
        return self.tokenizer.batch_decode(
            np.asarray(tokens).tolist(),
            skip_special_tokens=True,
            clean_up_tokenization_spaces=False,
        )

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
        """What the model writes after a prompt, the prompt left out: text after text,
        ids `[batch, new]` after ids `[batch, time]`.

        It ends at EOS, which is among the ids but not in the text; a row that ends
        before the others is filled with EOS. Keys and values are kept, so that each new
        token costs one pass over itself alone.

        Args:
          max_new_tokens: the most that is written.
          layer: the block whose output is spliced.
          splice: applied to the prompt's residual stream, `[batch, time, d_model]`,
            and then to each new token's, `[batch, 1, d_model]`: it must treat every
            position by itself.
          temperature: of the softmax that is sampled from; 0 takes the likeliest token.
          key: needed for a temperature above 0; it is consumed.
        """
        _check_choice(max_new_tokens, temperature, key)
        text = isinstance(prompt, str)
        tokens = self.tokenize(prompt) if text else np.asarray(prompt)
        self._check_prompt(tokens, max_new_tokens)
        length = -(-(tokens.shape[1] + max_new_tokens) // _ROOM) * _ROOM
        forward = self.cached(
            batch=len(tokens), length=length, layer=layer, splice=splice
        )
        new = _continued(
            forward,
            tokens,
            ends=sorted(self.eos_ids | generation_eos_ids(self.files)),
            count=max_new_tokens,
            temperature=temperature,
            key=key,
        )
        result: Any = self.decode(new)[0] if text else new
        return result

    def _check_prompt(self, tokens: Int[np.ndarray, "..."], new: int) -> None:
        if tokens.ndim != 2 or not tokens.size or tokens.dtype.kind not in "iu":
            raise UserError(
                f"a prompt of shape {list(tokens.shape)} and {tokens.dtype} is neither "
                "text nor token ids [batch, time]; lm.tokenize(text) makes such ids"
            )
        if not 0 <= tokens.min() <= tokens.max() < self.vocab_size:
            raise UserError(
                f"the prompt has token ids from {tokens.min()} to {tokens.max()}, but "
                f"the vocabulary has those from 0 to {self.vocab_size - 1}"
            )
        most, length = self.max_positions, tokens.shape[1] + new
        if most and length > most:
            raise UserError(
                f"a prompt of {tokens.shape[1]} tokens and max_new_tokens={new} exceed "
                f"the {most} positions of {self.name}; make either shorter"
            )

    def __repr__(self) -> str:
        kind = (self.files.config.get("architectures") or ["a language model"])[0]
        most = f", {self.max_positions:,} positions" if self.max_positions else ""
        return (
            f"<{type(self).__name__} {self.name}: {kind} in {self.dtype}\n"
            f" {self.n_layers} blocks, d_model {self.d_model:,}, vocabulary "
            f"{self.vocab_size:,}{most}\n"
            f" tokens made of texts start with BOS ({self.bos_id})>"
        )


def _check_choice(count: int, temperature: float, key: Any) -> None:
    if count < 1:
        raise UserError(f"max_new_tokens={count} must be at least 1")
    if not (temperature >= 0 and math.isfinite(temperature)):
        raise UserError(f"temperature={temperature} must be a finite number from 0 up")
    if temperature > 0 and key is None:
        raise UserError(
            f"temperature={temperature} draws tokens at random: give a key, such as "
            "key=jax.random.key(0), or temperature=0"
        )


def _continued(
    forward: Callable[[Tokens], Logits],
    tokens: Int[np.ndarray, "batch time"],
    *,
    ends: Sequence[int],
    count: int,
    temperature: float,
    key: Key[Array, ""] | None,
) -> Int[np.ndarray, "batch new"]:
    """Up to `count` tokens of each row, until all rows have come to an end."""
    ended = np.zeros(len(tokens), bool)
    new: list[np.ndarray] = []
    while len(new) < count and not ended.all():
        logits = forward(new[-1][:, None] if new else tokens)
        if temperature > 0:
            assert key is not None
            own = jax.random.fold_in(key, len(new))
            token = np.asarray(_sampled(own, logits, temperature))
        else:
            token = np.argmax(np.asarray(logits), axis=-1)
        new.append(np.where(ended, ends[:1] or 0, token).astype(np.int32))
        ended |= np.isin(new[-1], ends)
    return np.stack(new, axis=1)


@jax.jit
def _sampled(
    key: Key[Array, ""], logits: Logits, temperature: Float[Array | float, ""]
) -> Int[Array, " batch"]:
    return jax.random.categorical(key, logits / temperature, axis=-1)
