"""The families of `families.py` in JAX, equal to transformers' models in float32."""

import dataclasses
import functools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float

from vsae_jax.config.sites import Hook
from vsae_jax.lm import decoder
from vsae_jax.lm.decoder import Params, Spec, Stream
from vsae_jax.lm.dtype import choose_dtype
from vsae_jax.lm.families import FAMILIES, family_of, read_spec
from vsae_jax.lm.files import ModelFacts, ModelFiles, model_facts
from vsae_jax.lm.language_model import LanguageModel
from vsae_jax.lm.passes import (
    Cut,
    Losses,
    Residual,
    Splice,
    Tokens,
    apply_splice,
    check_layer,
    identity,
    splice_layer,
)
from vsae_jax.lm.tensors import read_params
from vsae_jax.system.errors import UserError


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["params"],
    meta_fields=["spec", *(field.name for field in dataclasses.fields(ModelFacts))],
)
@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class Decoder(LanguageModel):
    """A language model in JAX, which is `Traceable`."""

    spec: Spec
    params: Params

    @property
    def embedding(self) -> Float[Array, "vocab d_model"]:
        """What each token puts into the residual stream."""
        return self.params["embed"].astype(jnp.float32) * self.spec.embed_scale

    def check(self, hook: Hook) -> None:
        """Every family here has every site."""
        check_layer(hook.layer, n_layers=self.n_layers)

    def at(self, tokens: Tokens, hooks: Sequence[Hook]) -> list[Stream]:
        """What is at each hook, of one pass."""

        def of_part(tokens: Tokens) -> list[Array]:
            return self.at_from(self._embed(tokens), hooks)

        return _over_cores(of_part, tokens)

    def at_from(self, x: Residual, hooks: Sequence[Hook]) -> list[Stream]:
        """What is at each hook where tokens put `x` into the stream."""
        for hook in hooks:
            self.check(hook)
        found: dict[tuple[int, str], Array] = {}
        layers, done = sorted({hook.layer for hook in hooks}), 0
        for layer in layers:
            names = {hook.site for hook in hooks if hook.layer == layer}
            if names == {"resid_post"}:
                x = found[layer, "resid_post"] = self._run(x, done, layer + 1)
            else:
                # Where more blocks follow, the stream is needed, too.
                names |= {"resid_post"} if layer < layers[-1] else set()
                parts = self._block(self._run(x, done, layer), layer, *names)
                found |= {(layer, name): part for name, part in parts.items()}
                x = parts.get("resid_post", x)
            done = layer + 1
        return [found[hook] for hook in hooks]

    def cut(self, tokens: Tokens, hook: Hook) -> Cut:
        """The pass up to a hook."""
        if hook.site == "resid_post":
            return Cut(hook, self.at(tokens, [hook])[0])
        self.check(hook)

        def of_part(tokens: Tokens) -> tuple[Array, Array]:
            x = self._run(self._embed(tokens), 0, hook.layer)
            if hook.site == "attn_out":
                return self._block(x, hook.layer, "attn_out")["attn_out"], x
            parts = self._block(x, hook.layer, "mlp_out", "resid_mid")
            return parts["mlp_out"], parts["resid_mid"]

        return Cut(hook, *_over_cores(of_part, tokens))

    def joined(self, cut: Cut, values: Sequence[Residual]) -> list[Stream]:
        """The streams after the hook's block where each of `values` is at the hook."""
        values = [jnp.asarray(value, jnp.float32) for value in values]
        if cut.hook.site == "resid_post":
            return values
        if cut.hook.site == "mlp_out":
            return [cut.rest + value for value in values]
        layer = jnp.int32(cut.hook.layer)

        def of_part(x: Array, attn_out: Array) -> Array:
            return decoder.end_block(self.params, x, attn_out, layer, spec=self.spec)

        return [_over_cores(of_part, cut.rest, value) for value in values]

    def _embed(self, tokens: Tokens) -> Stream:
        return decoder.embed(self.params, jnp.asarray(tokens), spec=self.spec)

    def _run(self, x: Residual, start: int, stop: int) -> Array:
        """The stream after the blocks start, ..., stop - 1."""
        longest = self.spec.max_time
        if longest is not None and x.shape[1] > longest:
            raise UserError(
                f"a context of {x.shape[1]} tokens exceeds the {longest} positions of "
                f"--model={self.name}; make it shorter"
            )
        x = jnp.asarray(x)
        if start == stop > 0:
            return x
        return decoder.run_blocks(
            self.params, x, spec=self.spec, start=start, stop=stop
        )

    def _block(self, x: Array, layer: int, *names: str) -> dict[str, Array]:
        """What is at the named sites of block `layer`."""
        i, order = jnp.int32(layer), tuple(sorted(names))
        return decoder.run_block(self.params, x, i, spec=self.spec, names=order)

    def logits_from(
        self, residual: Residual, layer: int
    ) -> Float[Array, "batch time vocab"]:
        """The logits where the residual stream after block `layer` is `residual`."""
        start = check_layer(layer, n_layers=self.n_layers) + 1
        x = jnp.asarray(residual, jnp.float32)
        if start < self.n_layers:
            x = decoder.run_blocks(
                self.params, x, spec=self.spec, start=start, stop=self.n_layers
            )
        return decoder.unembed(self.params, x, spec=self.spec)

    def losses_from(
        self,
        residuals: Sequence[Residual],
        layer: int,
        tokens: Tokens,
        *,
        underflow: bool = False,
    ) -> Losses:
        """The losses of each stream after block `layer`, and KL from the first."""
        start = check_layer(layer, n_layers=self.n_layers) + 1

        def of_part(streams: Array, tokens: Tokens) -> tuple[Array, Array]:
            return decoder.losses(
                self.params,
                streams.swapaxes(0, 1),
                jnp.asarray(tokens),
                spec=self.spec,
                start=start,
                underflow=underflow,
            )

        streams = jnp.stack([jnp.asarray(x, jnp.float32) for x in residuals], axis=1)
        return Losses(*_over_cores(of_part, streams, tokens, axis=1))

    def cached(
        self,
        *,
        batch: int,
        length: int,
        layer: int | None = None,
        splice: Splice = identity,
    ) -> Callable[[Tokens], Float[Array, "batch vocab"]]:
        """A function of the next tokens; one compiled step runs them one by one."""
        layer = splice_layer(layer, [splice], n_layers=self.n_layers)
        n_below, n = layer + 1, self.n_layers
        spec, start = self.spec, 0
        cache = decoder.empty_cache(spec=spec, batch=batch, length=length)
        extend = functools.partial(decoder.extend, self.params, spec=spec)

        def forward(tokens: Tokens) -> Float[Array, "batch vocab"]:
            nonlocal cache, start
            tokens = jnp.asarray(tokens)
            if start + tokens.shape[1] > length:
                raise ValueError(f"there is room for {length} positions only")
            x = decoder.embed(self.params, tokens, spec=spec)
            x, cache = extend(x, cache, start, first=0, stop=n_below)
            x = jnp.asarray(apply_splice(splice, x), jnp.float32)
            if n_below < n:
                x, cache = extend(x, cache, start, first=n_below, stop=n)
            start += tokens.shape[1]
            return decoder.unembed(self.params, x[:, -1:], spec=spec)[:, 0]

        return forward


def _over_cores(
    run: Callable[..., Any], *batches: Residual | Tokens, axis: int = 0
) -> Any:
    """`run(*batches)`; on a CPU each core runs its share of the contexts, since XLA
    runs little but products on several cores. `axis`: the contexts' axis in what `run`
    returns."""
    batches = tuple(a if isinstance(a, jax.Array) else np.asarray(a) for a in batches)
    batch, time = batches[0].shape[0], batches[-1].shape[1]
    traced = any(isinstance(a, Tracer) for a in batches)
    if traced or jax.default_backend() != "cpu":
        return run(*batches)
    most = min(os.cpu_count() or 1, batch * time // decoder.POSITIONS["cpu"])
    cores = next(n for n in range(max(most, 1), 0, -1) if batch % n == 0)
    if cores == 1:
        return run(*batches)
    parts = zip(*(np.split(a, cores) for a in batches), strict=True)
    with ThreadPoolExecutor(cores) as threads:
        done = list(threads.map(lambda part: jax.block_until_ready(run(*part)), parts))
    return jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=axis), *done)


def load_decoder(files: ModelFiles, *, dtype: str) -> Decoder:
    """Reads config.json and the safetensors weights; needs no torch."""
    raw = files.config
    family = family_of(raw)
    if family is None:
        which = raw.get("architectures") or raw.get("model_type")
        raise UserError(
            f"--backend=jax does not run {str(which)[:80]} of --model={files.name}, "
            f"only {', '.join(FAMILIES)}; use --backend=transformers"
        )
    if dtype == "auto":
        dtype = choose_dtype(files, on_cpu=jax.default_backend() == "cpu")
    read = read_spec(family, raw)
    spec = read.spec
    facts = model_facts(
        files, raw, d_model=spec.d_model, n_layers=spec.n_layers, dtype=dtype
    )
    params = jax.tree.map(jnp.asarray, read_params(files, family, read, dtype=dtype))
    return Decoder(**vars(facts), spec=spec, params=params)
