"""The families of `families.py` in JAX, equal to transformers' models in float32."""

import dataclasses
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float

from vsae_jax.lm import decoder
from vsae_jax.lm.decoder import Params, Spec
from vsae_jax.lm.families import FAMILIES, family_of, read_spec
from vsae_jax.lm.files import ModelFacts, ModelFiles, model_facts
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
from vsae_jax.lm.tensors import read_params
from vsae_jax.system.errors import UserError


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["params"],
    meta_fields=["spec", *(field.name for field in dataclasses.fields(ModelFacts))],
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class Decoder(ModelFacts):
    """A `Traceable` model."""

    spec: Spec
    params: Params = dataclasses.field(repr=False)

    @property
    def embedding(self) -> Float[Array, "vocab d_model"]:
        """What each token puts into the residual stream."""
        return self.params["embed"].astype(jnp.float32) * self.spec.embed_scale

    def residual(
        self, tokens: Tokens, layer: int
    ) -> Float[Array, "batch time d_model"]:
        """The residual stream after block `layer`."""

        def of_part(tokens: Tokens) -> Array:
            x = decoder.embed(self.params, jnp.asarray(tokens), spec=self.spec)
            return self.residual_from(x, layer)

        return _over_cores(of_part, tokens)

    def residual_from(
        self, x: Residual, layer: int
    ) -> Float[Array, "batch time d_model"]:
        """The residual stream after block `layer` where tokens put `x` into it."""
        longest = self.spec.max_time
        if longest is not None and x.shape[1] > longest:
            raise UserError(
                f"a context of {x.shape[1]} tokens exceeds the {longest} positions of "
                f"--model={self.name}; make it shorter"
            )
        stop = check_layer(layer, n_layers=self.n_layers) + 1
        return decoder.run_blocks(
            self.params, jnp.asarray(x), spec=self.spec, start=0, stop=stop
        )

    def logits(
        self,
        tokens: Tokens,
        *,
        layer: int | None = None,
        splices: Sequence[Splice] = (identity,),
    ) -> list[Float[Array, "batch time vocab"]]:
        """The logits with each splice; the blocks up to `layer` run once."""
        layer = splice_layer(layer, splices, n_layers=self.n_layers)
        streams = self._spliced(tokens, layer, splices)
        return [self.logits_from(stream, layer) for stream in streams]

    def loss(
        self,
        tokens: Tokens,
        *,
        layer: int | None = None,
        splices: Sequence[Splice] = (identity,),
    ) -> list[Float[Array, "batch time-1"]]:
        """The next-token loss with each splice; logits come in pieces."""
        layer = splice_layer(layer, splices, n_layers=self.n_layers)
        streams = self._spliced(tokens, layer, splices)
        return [self.losses_from([x], layer, tokens).ce[0] for x in streams]

    def _spliced(
        self, tokens: Tokens, layer: int, splices: Sequence[Splice]
    ) -> Iterator[Float[Array, "batch time d_model"]]:
        lower: Residual = self.residual(tokens, layer)
        for splice in splices:
            yield jnp.asarray(apply_splice(splice, lower), jnp.float32)

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


def _over_cores(
    run: Callable[..., Any], *batches: Residual | Tokens, axis: int = 0
) -> Any:
    """`run(*batches)`; on a CPU each core has its part of the contexts, since XLA keeps
    only products on several. `axis`: that of the contexts in what `run` returns."""
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
    read = read_spec(family, raw)
    spec = read.spec
    facts = model_facts(
        files, raw, d_model=spec.d_model, n_layers=spec.n_layers, dtype=dtype
    )
    params = jax.tree.map(jnp.asarray, read_params(files, family, read, dtype=dtype))
    return Decoder(**vars(facts), spec=spec, params=params)
