"""GPT-NeoX (all of Pythia) in JAX: pure functions of a tree of parameters.

Equal to transformers' GPTNeoXForCausalLM in float32. Matrices keep torch's layout
`[out, in]`; the blocks' parameters are stacked on a leading axis `[n_layers, ...]`, so
that one compiled block runs any range of them.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from vsae_jax.lm import (
    Residual,
    Splice,
    Tokens,
    apply_splice,
    check_layer,
    identity,
    next_token_loss,
    splice_layer,
)
from vsae_jax.lm.files import ModelFacts, ModelFiles, model_facts, read_config
from vsae_jax.lm.neox_files import (
    ACTIVATIONS,
    NeoXConfig,
    Params,
    read_neox_config,
    read_params,
)


def _linear(
    x: Float[Array, "batch time d_in"],
    w: Float[Array, "d_out d_in"],
    b: Float[Array, " d_out"] | None,
) -> Float[Array, "batch time d_out"]:
    """x W' + b."""
    y = jnp.einsum("bti,oi->bto", x, w)
    return y if b is None else y + b[None, None, :]


def _layer_norm(
    x: Float[Array, "batch time d_model"],
    scale: Float[Array, " d_model"],
    bias: Float[Array, " d_model"],
    *,
    eps: float,
) -> Float[Array, "batch time d_model"]:
    """(x - E x) / sqrt(Var x + eps) * scale + bias."""
    x = x - x.mean(axis=-1, keepdims=True)
    x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)
    return x * scale[None, None, :] + bias[None, None, :]


def _rotate(
    x: Float[Array, "batch time heads d_head"], *, ndims: int, base: float
) -> Float[Array, "batch time heads d_head"]:
    """Rotary positions on the first `ndims` of each head.

    Coordinates i and i + ndims/2 turn by the angle t base^(-2i/ndims) at position t.
    """
    frequencies = np.float32(base) ** -(
        np.arange(0, ndims, 2, dtype=np.float32) / ndims
    )
    angles = jnp.arange(x.shape[1], dtype=jnp.float32)[:, None] * frequencies[None, :]
    cos, sin = jnp.cos(angles)[None, :, None], jnp.sin(angles)[None, :, None]
    half = len(frequencies)
    first, second, rest = jnp.split(x, [half, 2 * half], axis=-1)
    turned = [first * cos - second * sin, second * cos + first * sin, rest]
    return jnp.concatenate(turned, axis=-1)


def _attention(
    p: Params, x: Float[Array, "batch time d_model"], *, config: NeoXConfig
) -> Float[Array, "batch time d_model"]:
    """softmax(q k' / sqrt(d_head), causal) v; q, k, v lie side by side in each head."""
    batch, time, d_model = x.shape
    d_head = d_model // config.n_heads
    qkv = _linear(x, p["w_qkv"], p.get("b_qkv"))
    qkv = qkv.reshape(batch, time, config.n_heads, 3, d_head)
    turn = functools.partial(
        _rotate, ndims=config.rotary_ndims, base=config.rotary_base
    )
    q, k, v = turn(qkv[:, :, :, 0]), turn(qkv[:, :, :, 1]), qkv[:, :, :, 2]
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) * d_head**-0.5
    causal = jnp.tril(jnp.ones((time, time), bool))[None, None]
    weights = jax.nn.softmax(jnp.where(causal, scores, -jnp.inf), axis=-1)
    mixed = jnp.einsum("bhqk,bkhd->bqhd", weights, v)
    return _linear(mixed.reshape(x.shape), p["w_out"], p.get("b_out"))


def _mlp(
    p: Params, x: Float[Array, "batch time d_model"], *, config: NeoXConfig
) -> Float[Array, "batch time d_model"]:
    hidden = ACTIVATIONS[config.activation](_linear(x, p["w_up"], p["b_up"]))
    return _linear(hidden, p["w_down"], p["b_down"])


def _block(
    p: Params, x: Float[Array, "batch time d_model"], *, config: NeoXConfig
) -> Float[Array, "batch time d_model"]:
    """Parallel: x + attention(ln1 x) + mlp(ln2 x); else y + mlp(ln2 y) with
    y = x + attention(ln1 x)."""
    norm = functools.partial(_layer_norm, eps=config.layer_norm_eps)
    normed = norm(x, p["ln1_scale"], p["ln1_bias"])
    y = x + _attention(p, normed, config=config)
    mlp_input = x if config.parallel_residual else y
    normed = norm(mlp_input, p["ln2_scale"], p["ln2_bias"])
    return y + _mlp(p, normed, config=config)


@jax.jit
def embed(
    params: Params, tokens: Int[Array, "batch time"]
) -> Float[Array, "batch time d_model"]:
    """The residual stream before block 0; NaN for an id outside the vocabulary."""
    return jnp.take(params["embed"], tokens, axis=0, mode="fill", fill_value=jnp.nan)


@functools.partial(jax.jit, static_argnames=("config", "start", "stop"))
def run_blocks(
    params: Params,
    x: Float[Array, "batch time d_model"],
    *,
    config: NeoXConfig,
    start: int,
    stop: int,
) -> Float[Array, "batch time d_model"]:
    """The residual stream after the blocks start, ..., stop - 1."""

    def step(x, i):
        p = jax.tree.map(lambda stacked: stacked[i], params["blocks"])
        return _block(p, x, config=config), None

    # float32 means float32: a GPU's default would be TF32, three digits.
    with jax.default_matmul_precision("highest"):
        return jax.lax.scan(step, x, jnp.arange(start, stop))[0]


@functools.partial(jax.jit, static_argnames="config")
def unembed(
    params: Params, x: Float[Array, "batch time d_model"], *, config: NeoXConfig
) -> Float[Array, "batch time vocab"]:
    """The logits: ln_f(x) W_U'."""
    eps = config.layer_norm_eps
    x = _layer_norm(x, params["ln_scale"], params["ln_bias"], eps=eps)
    with jax.default_matmul_precision("highest"):
        return _linear(x, params["embed" if config.tied else "unembed"], None)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["params"],
    meta_fields=["config", *(field.name for field in dataclasses.fields(ModelFacts))],
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class NeoX(ModelFacts):
    """A `LanguageModel` that is a pytree of float32 parameters: pass it through
    `jax.jit` as an argument."""

    config: NeoXConfig
    params: Params = dataclasses.field(repr=False)

    def residual(
        self, tokens: Tokens, layer: int
    ) -> Float[Array, "batch time d_model"]:
        """The residual stream after block `layer`."""
        return self.residual_from(embed(self.params, tokens), layer)

    def residual_from(
        self, x: Float[Array, "batch time d_model"], layer: int
    ) -> Float[Array, "batch time d_model"]:
        """The residual stream after block `layer` where the one before block 0 is `x`:
        `embed(params, tokens)`, or a mixture of embeddings."""
        stop = check_layer(layer, n_layers=self.n_layers) + 1
        return run_blocks(self.params, x, config=self.config, start=0, stop=stop)

    def logits(
        self,
        tokens: Tokens,
        *,
        layer: int | None = None,
        splices: Sequence[Splice] = (identity,),
    ) -> list[Float[Array, "batch time vocab"]]:
        """The logits with each splice; the blocks up to `layer` run once."""
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
        return [next_token_loss(logits, tokens) for logits in each]

    def _each_logits(
        self, tokens: Tokens, *, layer: int | None, splices: Sequence[Splice]
    ) -> Iterator[Float[Array, "batch time vocab"]]:
        n_layers = self.n_layers
        layer = splice_layer(layer, splices, n_layers=n_layers)
        lower: Residual = self.residual(tokens, layer)
        upper = functools.partial(
            run_blocks, config=self.config, start=layer + 1, stop=n_layers
        )
        for splice in splices:
            x = jnp.asarray(apply_splice(splice, lower), jnp.float32)
            yield unembed(self.params, upper(self.params, x), config=self.config)


def load_neox(files: ModelFiles) -> NeoX:
    """Reads config.json and the safetensors weights; needs no torch."""
    raw = read_config(files)
    config = read_neox_config(raw)
    facts = model_facts(files, raw, d_model=config.d_model, n_layers=config.n_layers)
    params = jax.tree.map(jnp.asarray, read_params(files, config=config))
    return NeoX(**dataclasses.asdict(facts), config=config, params=params)
