"""Any causal language model through transformers and torch."""

import dataclasses
import functools
import importlib.util
import itertools
import operator
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, Int

from vsae_jax.lm.files import (
    ModelFacts,
    ModelFiles,
    Source,
    model_facts,
    transformers_source,
)
from vsae_jax.lm.protocol import (
    Losses,
    Residual,
    Splice,
    Tokens,
    apply_splice,
    check_layer,
    identity,
    splice_layer,
)
from vsae_jax.system.errors import UserError, missing_extra, one_line

if TYPE_CHECKING:
    import torch

# GPT-NeoX; GPT-2; Llama, Gemma, Qwen and most others; the text part of Gemma 3; OPT.
LAYER_PATHS = (
    "gpt_neox.layers",
    "transformer.h",
    "model.layers",
    "model.language_model.layers",
    "model.decoder.layers",
)


class _Reached(Exception):
    """Leaves the forward pass once the hooked block has run."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class HFModel(ModelFacts):
    """A `LanguageModel` around a torch module; arrays in and out are NumPy's.

    In bfloat16 it is transformers' own: the residual stream is bfloat16, too.
    """

    module: "torch.nn.Module" = dataclasses.field(repr=False)

    def residual(
        self, tokens: Tokens, layer: int
    ) -> Float[np.ndarray, "batch time d_model"]:
        """The residual stream after block `layer`; the pass ends there."""
        check_layer(layer, n_layers=self.n_layers)
        output = self._output(tokens, layer)
        stream = output[0] if isinstance(output, tuple) else output
        return stream.float().cpu().numpy()

    def _output(self, tokens: Tokens, layer: int) -> Any:
        """What block `layer` returns: the residual stream, or a tuple of it."""
        kept = []

        def keep_and_leave(module: Any, args: Any, output: Any) -> None:
            kept.append(output)
            raise _Reached

        block = find_layers(self.module)[layer]
        handle = block.register_forward_hook(keep_and_leave)
        try:
            self._forward(tokens)
        except _Reached:
            pass
        finally:
            handle.remove()
        return kept[0]

    def logits(
        self,
        tokens: Tokens,
        *,
        layer: int | None = None,
        splices: Sequence[Splice] = (identity,),
    ) -> list[Float[np.ndarray, "batch time vocab"]]:
        """The logits with each splice; the blocks up to `layer` run once."""
        last = splice_layer(layer, splices, n_layers=self.n_layers)
        if layer is None:
            logits = self._forward(tokens).float().cpu().numpy()
            return [logits for _ in splices]
        streams = self._spliced(tokens, last, splices)
        return [self.logits_from(stream, last) for stream in streams]

    def loss(
        self,
        tokens: Tokens,
        *,
        layer: int | None = None,
        splices: Sequence[Splice] = (identity,),
    ) -> list[Float[np.ndarray, "batch time-1"]]:
        """The next-token loss with each splice, one set of logits at a time."""
        layer = splice_layer(layer, splices, n_layers=self.n_layers)
        streams = self._spliced(tokens, layer, splices)
        return [np.asarray(self.losses_from([x], layer, tokens).ce[0]) for x in streams]

    def _spliced(
        self, tokens: Tokens, layer: int, splices: Sequence[Splice]
    ) -> Iterator[Float[np.ndarray, "batch time d_model"]]:
        lower = self.residual(tokens, layer)
        for splice in splices:
            # What a splice does to its argument reaches no other.
            yield np.asarray(apply_splice(splice, lower.copy()), np.float32)

    def logits_from(
        self, residual: Residual, layer: int
    ) -> Float[np.ndarray, "batch time vocab"]:
        """The logits where the residual stream after block `layer` is `residual`."""
        return self._logits_from(residual, layer).float().cpu().numpy()

    def _logits_from(self, residual: Residual, layer: int) -> "torch.Tensor":
        """As `logits_from`, in the model's dtype and on its device: the blocks up to
        `layer` are replaced by what returns `residual`."""
        import torch

        check_layer(layer, n_layers=self.n_layers)
        parameter = next(self.module.parameters())
        stream: Any = torch.as_tensor(np.array(residual, np.float32)).to(parameter)
        output = (stream,) if self._returns_tuples else stream
        blocks = find_layers(self.module)[: layer + 1]
        # Any tokens will do, all of it is replaced.
        tokens = np.full(stream.shape[:2], self.bos_id)
        try:
            for block in blocks:
                block.forward = lambda *args, **kwargs: output
            return self._forward(tokens)
        finally:
            for block in blocks:
                vars(block).pop("forward", None)

    @functools.cached_property
    def _returns_tuples(self) -> bool:
        return isinstance(self._output(np.full((1, 1), self.bos_id), 0), tuple)

    def losses_from(
        self,
        residuals: Sequence[Residual],
        layer: int,
        tokens: Tokens,
        *,
        underflow: bool = False,
    ) -> Losses:
        """The losses of each stream after block `layer`, and KL from the first; two
        sets of logits stand in memory, in float32 those of one context."""
        following = np.roll(np.asarray(tokens), -1, axis=1)
        first = self._logits_from(residuals[0], layer)
        each = [
            _losses(first, logits, following, underflow=underflow)
            for logits in itertools.chain(
                [first], (self._logits_from(x, layer) for x in residuals[1:])
            )
        ]
        ce, kl = (np.stack(parts) for parts in zip(*each, strict=True))
        return Losses(ce[:, :, :-1], kl)

    def _forward(self, tokens: Tokens) -> "torch.Tensor":
        """The logits `[batch, time, vocab]`, in the model's dtype, on its device."""
        import torch

        ids = torch.as_tensor(np.array(tokens), dtype=torch.long)
        with torch.no_grad():
            ids = ids.to(next(self.module.parameters()).device)
            return self.module(ids, use_cache=False).logits


def _losses(
    first: "torch.Tensor",
    logits: "torch.Tensor",
    following: Int[np.ndarray, "batch time"],
    *,
    underflow: bool,
) -> tuple[Float[np.ndarray, "batch time"], Float[np.ndarray, "batch time"]]:
    """Cross-entropy of the following token, and KL(softmax first || softmax logits)."""
    import torch

    def log_softmax(row: "torch.Tensor") -> "torch.Tensor":
        if underflow:
            return torch.log(torch.softmax(row.float(), -1))
        return torch.log_softmax(row.float(), -1)

    ce, kl = [], []
    for one, row, token in zip(first, logits, following, strict=True):
        target = torch.as_tensor(token, dtype=torch.long, device=row.device)
        loss = torch.nn.functional.cross_entropy(row.float(), target, reduction="none")
        log_p, log_q = log_softmax(one), log_softmax(row)
        ce.append(loss.cpu().numpy())
        kl.append((log_p.exp() * (log_p - log_q)).sum(-1).cpu().numpy())
    return np.stack(ce), np.stack(kl)


def find_layers(module: "torch.nn.Module") -> "torch.nn.ModuleList":
    """The decoder's blocks, wherever this family keeps them."""
    for path in LAYER_PATHS:
        try:
            return operator.attrgetter(path)(module)
        except AttributeError:
            continue
    raise UserError(
        f"{type(module).__name__} keeps its blocks in none of "
        f"{', '.join(LAYER_PATHS)}; use a GPT-NeoX, GPT-2, Llama, Gemma or Qwen model"
    )


def load_hf(files: ModelFiles, *, dtype: str) -> HFModel:
    """Reads a model into torch, on the GPU where there is one."""
    if importlib.util.find_spec("torch") is None:
        hint = missing_extra("torch", extra="torch")
        raise UserError(
            f"{hint} (--backend=jax needs none, for the families that it runs)"
        )
    import torch

    module = _read_module(transformers_source(files), name=files.name, dtype=dtype)
    module = module.eval().to("cuda" if torch.cuda.is_available() else "cpu")
    # Models of text and images keep the text model's facts one level down.
    text_config = module.config.get_text_config()
    n_layers = len(find_layers(module))
    facts = model_facts(
        files,
        {**module.config.to_dict(), **text_config.to_dict()},
        d_model=text_config.hidden_size,
        n_layers=n_layers,
        dtype=dtype,
    )
    return HFModel(**vars(facts), module=module)


def _read_module(source: Source, *, name: str, dtype: str) -> Any:
    import torch
    from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    # Its bars ("Loading weights") are of no use in the log of a command; the hub's,
    # which it turns off too, are while files come.
    bars = logging.is_progress_bar_enabled()
    downloads = not are_progress_bars_disabled()
    logging.disable_progress_bar()
    if downloads:
        enable_progress_bars()
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source.path,
            **source.arguments,
            dtype=getattr(torch, dtype),
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(
            f"--model={name} cannot be loaded by transformers: {one_line(error)}"
        ) from None
    finally:
        if bars:
            logging.enable_progress_bar()
    module, report = loaded
    # transformers only warns, and fills what is missing with random numbers.
    if report["missing_keys"]:
        raise UserError(
            f"the weights of --model={name} lack {sorted(report['missing_keys'])[0]}; "
            "restore the original files"
        )
    return module
