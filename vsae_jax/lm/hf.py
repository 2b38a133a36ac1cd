"""Any causal language model through transformers and torch, in float32."""

import dataclasses
import importlib.util
import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Array, Float

from vsae_jax.lm import (
    Splice,
    Tokens,
    apply_splice,
    check_layer,
    identity,
    next_token_loss,
    splice_layer,
)
from vsae_jax.lm.files import (
    ModelFacts,
    ModelFiles,
    Source,
    model_facts,
    transformers_source,
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
    """A `LanguageModel` around a torch module; arrays in and out are NumPy's."""

    module: "torch.nn.Module" = dataclasses.field(repr=False)

    def residual(
        self, tokens: Tokens, layer: int
    ) -> Float[np.ndarray, "batch time d_model"]:
        """The residual stream after block `layer`; the pass ends there."""
        check_layer(layer, n_layers=self.n_layers)
        kept = []

        def keep_and_leave(residual: "torch.Tensor") -> "torch.Tensor":
            kept.append(residual.float().cpu().numpy())
            raise _Reached

        with self._after_block(layer, keep_and_leave):
            try:
                self._forward(tokens)
            except _Reached:
                pass
        return kept[0]

    def logits(
        self,
        tokens: Tokens,
        *,
        layer: int | None = None,
        splices: Sequence[Splice] = (identity,),
    ) -> list[Float[np.ndarray, "batch time vocab"]]:
        """The logits with each splice; one whole forward pass per splice."""
        return list(self._each_logits(tokens, layer=layer, splices=splices))

    def loss(
        self,
        tokens: Tokens,
        *,
        layer: int | None = None,
        splices: Sequence[Splice] = (identity,),
    ) -> list[Float[Array, "batch time-1"]]:
        """The next-token loss with each splice, one set of logits at a time."""
        each = self._each_logits(tokens, layer=layer, splices=splices)
        return [next_token_loss(logits, np.asarray(tokens)) for logits in each]

    def _each_logits(
        self, tokens: Tokens, *, layer: int | None, splices: Sequence[Splice]
    ) -> Iterator[Float[np.ndarray, "batch time vocab"]]:
        layer = splice_layer(layer, splices, n_layers=self.n_layers)
        for splice in splices:
            with self._after_block(layer, lambda x: _replaced(x, splice)):
                logits = self._forward(tokens)
            yield logits

    def _forward(self, tokens: Tokens) -> Float[np.ndarray, "batch time vocab"]:
        import torch

        ids = torch.as_tensor(np.array(tokens), dtype=torch.long)
        with torch.no_grad():
            ids = ids.to(next(self.module.parameters()).device)
            return self.module(ids, use_cache=False).logits.float().cpu().numpy()

    @contextmanager
    def _after_block(
        self, layer: int, change: "Callable[[torch.Tensor], torch.Tensor]"
    ) -> Iterator[None]:
        """While inside, `change` maps what block `layer` returns."""

        def hook(module: Any, args: Any, output: Any) -> Any:
            if isinstance(output, tuple):
                return (change(output[0]), *output[1:])
            return change(output)

        handle = find_layers(self.module)[layer].register_forward_hook(hook)
        try:
            yield
        finally:
            handle.remove()


def _replaced(x: "torch.Tensor", splice: Splice) -> "torch.Tensor":
    """A splice of NumPy arrays, applied to a tensor."""
    import torch

    replaced = apply_splice(splice, x.float().cpu().numpy())
    return torch.as_tensor(np.array(replaced, np.float32)).to(x)


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


def load_hf(files: ModelFiles) -> HFModel:
    """Reads a model into torch in float32, on the GPU where there is one."""
    if importlib.util.find_spec("torch") is None:
        hint = missing_extra("torch", extra="torch")
        raise UserError(f"{hint} (GPT-NeoX models also run with --backend=jax)")
    import torch

    module = _read_module(transformers_source(files), name=files.name)
    module = module.eval().to("cuda" if torch.cuda.is_available() else "cpu")
    # Models of text and images keep the text model's facts one level down.
    text_config = module.config.get_text_config()
    n_layers = len(find_layers(module))
    facts = model_facts(
        files,
        {**module.config.to_dict(), **text_config.to_dict()},
        d_model=text_config.hidden_size,
        n_layers=n_layers,
    )
    return HFModel(**dataclasses.asdict(facts), module=module)


def _read_module(source: Source, *, name: str) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source.path,
            **source.arguments,
            dtype=torch.float32,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(
            f"--model={name} cannot be loaded by transformers: {one_line(error)}"
        ) from None
    module, report = loaded
    # transformers only warns, and fills what is missing with random numbers.
    if report["missing_keys"]:
        raise UserError(
            f"the weights of --model={name} lack {sorted(report['missing_keys'])[0]}; "
            "restore the original files"
        )
    return module
