"""Any causal language model through transformers and torch."""

import dataclasses
import functools
import inspect
import itertools
import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, Int

from vsae_jax.config.sites import Hook, Site
from vsae_jax.lm.dtype import choose_dtype
from vsae_jax.lm.files import (
    ModelFiles,
    Source,
    model_facts,
    transformers_source,
)
from vsae_jax.lm.language_model import LanguageModel
from vsae_jax.lm.passes import (
    Cut,
    Logits,
    Losses,
    Residual,
    Splice,
    Tokens,
    apply_splice,
    check_layer,
    identity,
    splice_layer,
)
from vsae_jax.lm.torch_device import placed
from vsae_jax.system.errors import UserError, one_line

if TYPE_CHECKING:
    import torch

# Of GPT-NeoX; GPT-2; Llama, Gemma, Qwen and most others; Gemma 3's text part; OPT.
LAYER_PATHS = (
    "gpt_neox.layers",
    "transformer.h",
    "model.layers",
    "model.language_model.layers",
    "model.decoder.layers",
)


# A block's modules whose outputs it adds to the stream.
_PARTS = {
    "attn_out": ("self_attn", "attention", "attn", "self_attention"),
    "mlp_out": ("mlp",),
}
_POST_NORMS = {
    "attn_out": ("post_attention_layernorm",),
    "mlp_out": ("post_feedforward_layernorm",),
}


class _Reached(Exception):
    """Leaves the forward pass once the hooked block has run."""


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class HFModel(LanguageModel):
    """A `LanguageModel` around a torch module; arrays in and out are NumPy's.

    With `--lm_dtype=bfloat16` the residual stream is bfloat16, too, as in transformers.
    """

    module: "torch.nn.Module"

    def check(self, hook: Hook) -> None:
        """Refuses a hook where what is there is not simply added to the stream."""
        check_layer(hook.layer, n_layers=self.n_layers)
        if hook.site == "resid_post" or hook.layer in self._known:
            return
        if self._adds_up(hook.layer):
            self._known.add(hook.layer)
            return
        block = type(find_layers(self.module)[hook.layer]).__name__
        raise UserError(
            f"--site={hook.site}: {block} of --model={self.name} does not simply add "
            "the outputs of an attention and an MLP known here to the residual stream; "
            "take --site=resid_post"
        )

    def _adds_up(self, layer: int) -> bool:
        """Whether stream before + attention's part + MLP's part = stream after."""
        import torch

        block = find_layers(self.module)[layer]
        parts = [_part(block, "attn_out"), _part(block, "mlp_out")]
        if None in parts:
            return False
        terms: list[Any] = []

        def keep(module: Any, args: Any, output: Any) -> None:
            terms.append(args[0] if module is block else _first(output))

        watched = [(module, keep) for module in (*parts, block)]
        after = _first(self._output(np.full((1, 2), self.bos_id), layer, watched))
        if [term.shape for term in terms] != [after.shape] * 3:
            return False
        error = (sum(term.double() for term in terms) - after).abs()
        size = sum(term.double().abs() for term in terms)
        return bool((error <= 4 * torch.finfo(after.dtype).eps * size).all())

    @functools.cached_property
    def _known(self) -> set[int]:
        """Blocks that were found to add up."""
        return set()

    def at(
        self, tokens: Tokens, hooks: Sequence[Hook]
    ) -> list[Float[np.ndarray, "batch time d_model"]]:
        """What is at each hook; the pass ends after the last block of them."""
        blocks, kept = find_layers(self.module), {}

        def keeper(hook: Hook) -> Any:
            return lambda module, args, out: kept.update({hook: _first(out)})

        for hook in hooks:
            self.check(hook)
        watched = [(_part(blocks[h.layer], h.site), keeper(h)) for h in hooks]
        self._output(tokens, max(hook.layer for hook in hooks), watched)
        return [kept[hook].float().cpu().numpy() for hook in hooks]

    def cut(self, tokens: Tokens, hook: Hook) -> Cut:
        """The pass up to a hook. Its rest holds the tokens and, for a part of a block
        after the first, the stream before that block."""
        inside = hook.site != "resid_post" and hook.layer > 0
        below = [Hook(hook.layer - 1)] if inside else []
        value, *before = self.at(tokens, [hook, *below])
        return Cut(hook, value, (tokens, *before))

    def joined(
        self, cut: Cut, values: Sequence[Residual]
    ) -> list[Float[np.ndarray, "batch time d_model"]]:
        """The streams after the hook's block where each of `values` is at the hook: the
        block runs once for each, its attention's or MLP's output replaced."""
        if cut.hook.site == "resid_post":
            return [np.asarray(value, np.float32) for value in values]
        tokens, *before = cut.rest
        below = self._replaced(cut.hook.layer, before[0]) if before else nullcontext()
        part = _part(find_layers(self.module)[cut.hook.layer], cut.hook.site)
        streams = []
        with below:
            for value in values:
                new = self._tensor(value)
                replace = (part, lambda m, a, out, new=new: _with_first(out, new))
                stream = _first(self._output(tokens, cut.hook.layer, [replace]))
                streams.append(stream.float().cpu().numpy())
        return streams

    def _output(
        self, tokens: Tokens, layer: int, watched: Sequence[tuple[Any, Any]] = ()
    ) -> Any:
        """What block `layer` returns, where the pass ends: the residual stream, or a
        tuple that begins with it. `watched`: modules, each with a forward hook."""
        kept = []

        def keep_and_leave(module: Any, args: Any, output: Any) -> None:
            kept.append(output)
            raise _Reached

        block = find_layers(self.module)[layer]
        with ExitStack() as stack:
            for module, hook in (*watched, (block, keep_and_leave)):
                stack.callback(module.register_forward_hook(hook).remove)
            with suppress(_Reached):
                self._forward(tokens)
        return kept[0]

    def logits(
        self,
        tokens: Tokens,
        *,
        layer: int | None = None,
        site: Site = "resid_post",
        splices: Sequence[Splice] = (identity,),
    ) -> list[Logits]:
        """The logits with each splice; without any, of one plain pass."""
        if layer is not None:
            return super().logits(tokens, layer=layer, site=site, splices=splices)
        splice_layer(layer, splices, n_layers=self.n_layers, site=site)
        logits = self._forward(tokens).float().cpu().numpy()
        return [logits for _ in splices]

    def logits_from(
        self, residual: Residual, layer: int
    ) -> Float[np.ndarray, "batch time vocab"]:
        """The logits where the residual stream after block `layer` is `residual`."""
        return self._logits_from(residual, layer).float().cpu().numpy()

    def _logits_from(self, residual: Residual, layer: int) -> "torch.Tensor":
        """`logits_from` in the model's dtype and on its device: the blocks up to
        `layer` return `residual` instead of running."""
        check_layer(layer, n_layers=self.n_layers)
        # Any tokens will do: the stream that they make is replaced.
        tokens = np.full(np.shape(residual)[:2], self.bos_id)
        with self._replaced(layer + 1, residual):
            return self._forward(tokens)

    @contextmanager
    def _replaced(self, count: int, residual: Residual) -> Iterator[None]:
        """Within the block, the first `count` blocks only return `residual`."""
        stream = self._tensor(residual)
        output = (stream,) if self._returns_tuples else stream
        blocks = find_layers(self.module)[:count]
        try:
            for block in blocks:
                block.forward = lambda *args, **kwargs: output
            yield
        finally:
            for block in blocks:
                vars(block).pop("forward", None)

    def _tensor(self, residual: Residual) -> "torch.Tensor":
        """An array in the model's dtype and on its device."""
        import torch

        parameter = next(self.module.parameters())
        return torch.as_tensor(np.array(residual, np.float32)).to(parameter)

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
        """The losses of each stream after block `layer`, and KL from the first. Two
        sets of logits are in memory at once, those of one context in float32."""
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

    def cached(
        self,
        *,
        batch: int,
        length: int,
        layer: int | None = None,
        splice: Splice = identity,
    ) -> Callable[[Tokens], Float[np.ndarray, "batch vocab"]]:
        """A function of the next tokens; transformers' own cache grows as it needs."""
        del batch, length
        last = splice_layer(layer, [splice], n_layers=self.n_layers)
        block = find_layers(self.module)[last]
        # The argument's name changed with transformers 5.2x.
        accepted = inspect.signature(self.module.forward).parameters
        name = "cache" if "cache" in accepted else "past_key_values"
        past: Any = None

        def hook(module: Any, args: Any, output: Any) -> Any:
            stream = _first(output).float().cpu().numpy()
            return _with_first(output, self._tensor(apply_splice(splice, stream)))

        def forward(tokens: Tokens) -> Float[np.ndarray, "batch vocab"]:
            nonlocal past
            with ExitStack() as stack:
                if splice is not identity:
                    stack.callback(block.register_forward_hook(hook).remove)
                output = self._call(tokens, use_cache=True, **{name: past})
            past = output.get(name)
            if past is None:
                raise UserError(
                    f"{type(self.module).__name__} of --model={self.name} keeps no "
                    "keys and values, which generation needs"
                )
            return output.logits[:, -1].float().cpu().numpy()

        return forward

    def _forward(self, tokens: Tokens) -> "torch.Tensor":
        """The logits `[batch, time, vocab]`, in the model's dtype, on its device."""
        return self._call(tokens, use_cache=False).logits

    def _call(self, tokens: Tokens, **how: Any) -> Any:
        import torch

        ids = torch.as_tensor(np.array(tokens), dtype=torch.long)
        with torch.no_grad():
            return self.module(ids.to(next(self.module.parameters()).device), **how)


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


def _part(block: "torch.nn.Module", site: str) -> Any:
    """The module whose output is what a site holds; None where none is known."""
    if site == "resid_post":
        return block
    # In Gemma 2 and 3 and OLMo 2 what is added is normalised once more.
    post_norms = hasattr(block, "post_feedforward_layernorm")
    names = (_POST_NORMS if post_norms else _PARTS)[site]
    return next((getattr(block, name) for name in names if hasattr(block, name)), None)


def _first(output: Any) -> Any:
    """The stream in what a module returns: all of it, or the first of a tuple."""
    return output[0] if isinstance(output, tuple) else output


def _with_first(output: Any, new: "torch.Tensor") -> Any:
    return (new, *output[1:]) if isinstance(output, tuple) else new


def load_hf(files: ModelFiles, *, dtype: str, device: str) -> HFModel:
    """Reads a model into torch, on a device that `torch_device` resolves."""
    device = placed(device)
    if dtype == "auto":
        dtype = choose_dtype(files, on_cpu=device == "cpu")
    module = _read_module(transformers_source(files), name=files.name, dtype=dtype)
    module = module.eval().to(device)
    # Models of text and images keep the text model's config one level down.
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

    # Its bars ("Loading weights") only clutter the log of a command. It also turns off
    # the hub's, which are useful while files are downloaded.
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
    # transformers would only warn, and fill what is missing with random numbers.
    if report["missing_keys"]:
        raise UserError(
            f"the weights of --model={name} lack {sorted(report['missing_keys'])[0]}; "
            "restore the original files"
        )
    return module
