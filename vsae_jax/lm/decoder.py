"""The forward pass of a decoder-only language model: pure functions of parameters.

A model's `Spec`, which `families.py` reads from its config.json, says which steps it
takes. The blocks' arrays are stacked on a leading axis `[n_layers, ...]`, so that one
compiled block runs any range of them. Matrices are `[in, out]`, because a CPU
multiplies bfloat16 matrices at full speed only where both are stored by rows.

With matrices in float32 everything is float32. With matrices in bfloat16 the operands
of every product are rounded to bfloat16 and summed in float32; norms, rotations,
softmax, activations and the residual stream stay in float32.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

Params = dict[str, Any]
Start = int | Int[Array, ""]
Stream = Float[Array, "batch time d_model"]


class Cache(NamedTuple):
    """The keys and values of the positions that ran so far; of one block, or of all of
    them on a leading axis."""

    keys: Float[Array, "*n_layers batch n_kv_heads length d_head"]
    values: Float[Array, "*n_layers batch n_kv_heads length d_head"]


_tanh_gelu = functools.partial(jax.nn.gelu, approximate=True)
ACTIVATIONS = {
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_new": _tanh_gelu,
    "gelu_fast": _tanh_gelu,
    "gelu_pytorch_tanh": _tanh_gelu,
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
}
# Positions that a block runs at once. On a CPU their intermediate values then stay in
# cache, which makes the MLP twice as fast; elsewhere this bounds the memory.
POSITIONS = {"cpu": 256}
_MOST_POSITIONS = 2**15
# Bytes of logits in memory at once where only their losses are asked for.
_LOGIT_BYTES = 2**26


@dataclass(frozen=True, kw_only=True)
class Spec:
    """The steps of a model, all of them static.

    n_kv_heads: heads of keys and values, each shared by `n_heads / n_kv_heads` queries.
    gated: the MLP is down(act(gate x) * up x), else down(act(up x)).
    parallel: attention and MLP read the same residual stream, else one after the other.
    post_norms: what attention and MLP add is also normalised.
    attention_cap, logit_cap: c of c tanh(y / c) on scores and logits; None for none.
    rotary_scale: factor of the rotations' cosine and sine, above 1 with YaRN.
    max_time: the longest context that can be run; None for any.
    """

    vocab_size: int
    d_model: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    d_head: int
    d_mlp: int
    norm: Literal["layer", "rms"]
    norm_eps: float
    activation: str
    attention_scale: float
    gated: bool = False
    parallel: bool = False
    post_norms: bool = False
    qk_norm: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    tied: bool = False
    embed_scale: float = 1.0
    attention_cap: float | None = None
    logit_cap: float | None = None
    rotary_scale: float = 1.0
    learned_positions: bool = False
    max_time: int | None = None


def outer_arrays(spec: Spec) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the arrays outside the blocks, as files hold them."""
    d, vocab = spec.d_model, spec.vocab_size
    shapes: dict[str, tuple[int, ...]] = {"embed": (vocab, d)}
    if spec.learned_positions:
        assert spec.max_time is not None
        shapes["positions"] = (spec.max_time, d)
    if not spec.tied:
        shapes["unembed"] = (d, vocab)
    return shapes | _norm_arrays(spec, "ln", d)


def block_arrays(spec: Spec) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the arrays of one block."""
    d, d_mlp = spec.d_model, spec.d_mlp
    d_attention = spec.n_heads * spec.d_head
    d_qkv = d_attention + 2 * spec.n_kv_heads * spec.d_head
    up = {"gate": (d, d_mlp), "up": (d, d_mlp)} if spec.gated else {"up": (d, d_mlp)}
    matrices = {"qkv": (d, d_qkv), "out": (d_attention, d)} | up | {"down": (d_mlp, d)}
    biased = {"qkv": spec.qkv_bias, "out": spec.out_bias}
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in matrices.items():
        shapes[f"w_{name}"] = shape
        if biased.get(name, spec.mlp_bias):
            shapes[f"b_{name}"] = shape[1:]
    for name in ("ln1", "ln2", *(("post1", "post2") if spec.post_norms else ())):
        shapes |= _norm_arrays(spec, name, d)
    if spec.qk_norm:
        shapes |= {"q_norm_scale": (spec.d_head,), "k_norm_scale": (spec.d_head,)}
    return shapes


def _norm_arrays(spec: Spec, name: str, d: int) -> dict[str, tuple[int, ...]]:
    names = ("scale", "bias") if spec.norm == "layer" else ("scale",)
    return {f"{name}_{part}": (d,) for part in names}


def _product(x: Array, w: Array, dtype: Any) -> Array:
    """x @ w, operands of `dtype`, in float32."""
    # float32 means float32: a GPU's default would be TF32, three digits.
    precision = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None
    # A CPU multiplies one row in bfloat16 (a generated token) six times slower than
    # two rows.
    alone = w.ndim == 2 and x.size == w.shape[0]
    twice = alone and dtype != jnp.float32 and jax.default_backend() == "cpu"
    x = jnp.concatenate([x, x], axis=-2) if twice else x
    product = jnp.matmul(
        x.astype(dtype),
        w.astype(dtype),
        precision=precision,
        preferred_element_type=jnp.float32,
    )
    return product[..., :1, :] if twice else product


def _linear(p: Params, name: str, x: Array) -> Array:
    """x W + b of one of the block's matrices; not every one has a b."""
    w, b = p[f"w_{name}"], p.get(f"b_{name}")
    y = _product(x, w, w.dtype)
    return y if b is None else y + b[None, None, :]


def _norm(
    p: Params, name: str, x: Float[Array, "... d"], *, spec: Spec
) -> Float[Array, "... d"]:
    """LayerNorm, or x / rms(x), times a scale."""
    if spec.norm == "layer":
        x = x - jnp.mean(x, axis=-1, keepdims=True)
    mean_square = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
    x = x * jax.lax.rsqrt(mean_square + spec.norm_eps)
    over_rows = (None,) * (x.ndim - 1)
    x = x * p[f"{name}_scale"][over_rows]
    return x + p[f"{name}_bias"][over_rows] if spec.norm == "layer" else x


def _rotations(
    frequencies: Float[Array, " half"], start: Start, time: int, *, scale: float
) -> tuple[Float[Array, "time half"], Float[Array, "time half"]]:
    """Cosine and sine of the angles of positions start, ..., times `scale`."""
    positions = (start + jnp.arange(time)).astype(jnp.float32)
    angles = positions[:, None] * frequencies[None, :]
    return scale * jnp.cos(angles), scale * jnp.sin(angles)


def _rotate(
    x: Float[Array, "batch heads time d_head"],
    cos: Float[Array, "time half"],
    sin: Float[Array, "time half"],
) -> Float[Array, "batch heads time d_head"]:
    """Rotary positions: dimension i turns with i + half, those beyond both stay."""
    half = cos.shape[1]
    cos, sin = cos[None, None], sin[None, None]
    first, second, rest = jnp.split(x, [half, 2 * half], axis=-1)
    turned = [first * cos - second * sin, second * cos + first * sin, rest]
    return jnp.concatenate(turned, axis=-1)


def _capped(x: Array, cap: float | None) -> Array:
    return x if cap is None else cap * jnp.tanh(x / cap)


def _visible(
    p: Params, start: Start, *, n_queries: int, n_keys: int
) -> Bool[Array, "queries keys"]:
    """Which keys the queries start, start + 1, ... see: none that comes later, none
    that is `window` or more positions earlier."""
    distance = start + jnp.arange(n_queries)[:, None] - jnp.arange(n_keys)[None, :]
    return (distance >= 0) & (distance.astype(jnp.float32) < p["window"])


def _attention(
    p: Params, x: Stream, *, spec: Spec, past: Cache | None = None, start: Start = 0
) -> tuple[Stream, Cache]:
    """softmax(q k' * scale) v over the visible positions, and their k and v. Where
    there is a `past`, those of x are written into it from `start` on."""
    batch, time, _ = x.shape
    n_kv, d, dtype = spec.n_kv_heads, spec.d_head, p["w_qkv"].dtype
    group = spec.n_heads // n_kv
    heads = _linear(p, "qkv", x).reshape(batch, time, -1, d).transpose(0, 2, 1, 3)
    q, k, v = jnp.split(heads, [spec.n_heads, spec.n_heads + n_kv], axis=1)
    if spec.qk_norm:
        q, k = _norm(p, "q_norm", q, spec=spec), _norm(p, "k_norm", k, spec=spec)
    if "cos" in p:
        q, k = (_rotate(a, p["cos"], p["sin"]) for a in (q, k))
    if past is not None:
        write = functools.partial(jax.lax.dynamic_update_slice_in_dim, axis=2)
        k, v = (write(a, b, start) for a, b in zip(past, (k, v)))
    # The queries that share a key are rows of one matrix, stored by rows.
    q = q.reshape(batch, n_kv, group * time, d)
    scores = _product(q, k.transpose(0, 1, 3, 2), dtype) * spec.attention_scale
    scores = _capped(scores, spec.attention_cap)
    n_keys = k.shape[2]
    scores = scores.reshape(batch, n_kv, group, time, n_keys)
    visible = _visible(p, start, n_queries=time, n_keys=n_keys)[None, None, None]
    weights = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf), axis=-1)
    weights = weights.reshape(batch, n_kv, group * time, n_keys)
    mixed = _product(weights, v, dtype)
    mixed = mixed.reshape(batch, n_kv, group, time, d).transpose(0, 3, 1, 2, 4)
    return _linear(p, "out", mixed.reshape(batch, time, -1)), Cache(k, v)


def _mlp(p: Params, x: Stream, *, spec: Spec) -> Stream:
    act = ACTIVATIONS[spec.activation]
    if not spec.gated:
        return _linear(p, "down", act(_linear(p, "up", x)))
    return _linear(p, "down", act(_linear(p, "gate", x)) * _linear(p, "up", x))


def _attn_out(
    p: Params, x: Stream, *, spec: Spec, past: Cache | None = None, start: Start = 0
) -> tuple[Stream, Cache]:
    """What attention adds to the stream x, and `_attention`'s keys and values."""
    norm = functools.partial(_norm, p, spec=spec)
    added, cache = _attention(p, norm("ln1", x), spec=spec, past=past, start=start)
    return norm("post1", added) if spec.post_norms else added, cache


def _sites(
    p: Params, x: Stream, *, spec: Spec, attn_out: Stream | None = None
) -> dict[str, Stream]:
    """What a block makes of the stream x, under TransformerLens' names: y + mlp(ln2 y)
    with y = x + attention(ln1 x); if parallel, y + mlp(ln2 x). A given `attn_out`
    replaces attention's part."""
    norm = functools.partial(_norm, p, spec=spec)
    if attn_out is None:
        attn_out, _ = _attn_out(p, x, spec=spec)
    y = x + attn_out
    added = _mlp(p, norm("ln2", x if spec.parallel else y), spec=spec)
    mlp_out = norm("post2", added) if spec.post_norms else added
    return {
        "attn_out": attn_out,
        "resid_mid": y,
        "mlp_out": mlp_out,
        "resid_post": y + mlp_out,
    }


def _block(p: Params, x: Stream, *, spec: Spec) -> Stream:
    return _sites(p, x, spec=spec)["resid_post"]


@functools.partial(jax.jit, static_argnames="spec")
def embed(params: Params, tokens: Int[Array, "batch time"], *, spec: Spec) -> Stream:
    """What tokens put into the residual stream; NaN for ids beyond the vocabulary."""
    rows = jnp.take(params["embed"], tokens, axis=0, mode="fill", fill_value=jnp.nan)
    return rows.astype(jnp.float32) * spec.embed_scale


@functools.partial(jax.jit, static_argnames=("spec", "start", "stop"))
def run_blocks(
    params: Params, x: Stream, *, spec: Spec, start: int, stop: int
) -> Stream:
    """The residual stream after the blocks start, ..., stop - 1; before block 0 it is
    `embed(params, tokens)`, to which learned positions are added here."""
    if start == 0 and spec.learned_positions:
        x = x + params["positions"][None, : x.shape[1]].astype(jnp.float32)

    shape = x.shape

    def step(x: Array, i: Array) -> tuple[Array, None]:
        p = _arrays_of(params, i, shape[1], spec=spec)
        return jax.lax.map(functools.partial(_block, p, spec=spec), x), None

    x = _in_pieces(x)
    return jax.lax.scan(step, x, jnp.arange(start, stop))[0].reshape(shape)


@functools.partial(jax.jit, static_argnames=("spec", "names"))
def run_block(
    params: Params,
    x: Stream,
    layer: Int[Array, ""],
    *,
    spec: Spec,
    names: tuple[str, ...],
) -> dict[str, Stream]:
    """What is at the sites of these names in block `layer`, where the stream before it
    is x, learned positions included: attn_out, resid_mid (before the MLP's part is
    added), mlp_out, resid_post."""
    p = _arrays_of(params, layer, x.shape[1], spec=spec)

    def piece(x: Array) -> dict[str, Array]:
        found = _sites(p, x, spec=spec)
        return {name: found[name] for name in names}

    found = jax.lax.map(piece, _in_pieces(x))
    return jax.tree.map(lambda a: a.reshape(x.shape), found)


@functools.partial(jax.jit, static_argnames="spec")
def end_block(
    params: Params, x: Stream, attn_out: Stream, layer: Int[Array, ""], *, spec: Spec
) -> Stream:
    """The stream after block `layer`, where it was x before and attention added
    `attn_out`."""
    p = _arrays_of(params, layer, x.shape[1], spec=spec)

    def piece(args: tuple[Array, Array]) -> Array:
        return _sites(p, args[0], spec=spec, attn_out=args[1])["resid_post"]

    pieces = _in_pieces(x), _in_pieces(attn_out)
    return jax.lax.map(piece, pieces).reshape(x.shape)


def _in_pieces(x: Stream) -> Float[Array, "pieces contexts time d_model"]:
    """The batch in pieces that a block runs at once."""
    return x.reshape(-1, _contexts_at_once(*x.shape[:2]), *x.shape[1:])


def empty_cache(*, spec: Spec, batch: int, length: int) -> Cache:
    """Room for contexts of up to `length` positions."""
    shape = spec.n_layers, batch, spec.n_kv_heads, length, spec.d_head
    return Cache(jnp.zeros(shape), jnp.zeros(shape))


@functools.partial(
    jax.jit, static_argnames=("spec", "first", "stop"), donate_argnames="cache"
)
def extend(
    params: Params,
    x: Stream,
    cache: Cache,
    start: Int[Array, ""],
    *,
    spec: Spec,
    first: int,
    stop: int,
) -> tuple[Stream, Cache]:
    """`run_blocks` over the blocks first, ..., stop - 1 where x has the positions
    start, start + 1, ... and the cache those before them; also the extended cache."""
    time = x.shape[1]
    if first == 0 and spec.learned_positions:
        own = jax.lax.dynamic_slice_in_dim(params["positions"], start, time)
        x = x + own[None].astype(jnp.float32)

    def step(carry: tuple[Array, Cache], i: Array) -> tuple[tuple[Array, Cache], None]:
        x, cache = carry
        p = _arrays_of(params, i, time, spec=spec, start=start)
        past = Cache(cache.keys[i], cache.values[i])
        attn_out, own = _attn_out(p, x, spec=spec, past=past, start=start)
        x = _sites(p, x, spec=spec, attn_out=attn_out)["resid_post"]
        cache = jax.tree.map(lambda each, one: each.at[i].set(one), cache, own)
        return (x, cache), None

    return jax.lax.scan(step, (x, cache), jnp.arange(first, stop))[0]


def stack(blocks: Sequence[np.ndarray]) -> np.ndarray:
    """The blocks' arrays on a leading axis, bfloat16 as its bits: XLA on a CPU would
    otherwise move the conversion of one block's part out of the loop, and turn all
    blocks' matrices into float32 at every call."""
    stacked = np.stack(blocks)
    return stacked.view(np.uint16) if stacked.dtype == jnp.bfloat16 else stacked


def _arrays_of(
    params: Params, i: Int[Array, ""], time: int, *, spec: Spec, start: Start = 0
) -> Params:
    """Block i's arrays, and the rotations of `time` positions from `start` on."""
    p = jax.tree.map(functools.partial(_of_block, i=i), params["blocks"])
    if "frequencies" in p:
        turn = _rotations(p["frequencies"], start, time, scale=spec.rotary_scale)
        p["cos"], p["sin"] = turn
    return p


def _of_block(stacked: Array, i: Int[Array, ""]) -> Array:
    """Block i's part of what `stack` made."""
    part = stacked[i]
    bits = part.dtype == jnp.uint16
    return jax.lax.bitcast_convert_type(part, jnp.bfloat16) if bits else part


def _contexts_at_once(batch: int, time: int) -> int:
    """The most contexts of at most `POSITIONS` in all that divide the batch evenly."""
    most = POSITIONS.get(jax.default_backend(), _MOST_POSITIONS)
    most = max(min(most // time, batch), 1)
    return next(n for n in range(most, 0, -1) if batch % n == 0)


@functools.partial(jax.jit, static_argnames="spec")
def unembed(
    params: Params, x: Stream, *, spec: Spec
) -> Float[Array, "batch time vocab"]:
    """The logits of a residual stream after the last block."""
    w = params["unembed"]
    logits = _product(_norm(params, "ln", x, spec=spec), w, w.dtype)
    return _capped(logits, spec.logit_cap)


@functools.partial(jax.jit, static_argnames=("spec", "start", "underflow"))
def losses(
    params: Params,
    streams: Float[Array, "n batch time d_model"],
    tokens: Int[Array, "batch time"],
    *,
    spec: Spec,
    start: int,
    underflow: bool = False,
) -> tuple[Float[Array, "n batch time-1"], Float[Array, "n batch time"]]:
    """Next-token loss of each stream, which the blocks from `start` on have yet to run
    through, and KL(p_0 || p_i) of stream i from the first; in nats.

    Logits are made a few positions at a time. underflow: log p is the log of a softmax,
    which can be -inf.
    """
    n, batch, time, d = streams.shape
    run = functools.partial(
        run_blocks, params, spec=spec, start=start, stop=spec.n_layers
    )
    rows = run(streams.reshape(n * batch, time, d)).reshape(n, batch * time, d)
    # The last position of a context predicts nothing; its loss is dropped below.
    following = jnp.roll(tokens, -1, axis=1).reshape(-1)

    def piece(args: tuple[Array, Array]) -> tuple[Array, Array]:
        x, token = args
        logits = unembed(params, x[:, None], spec=spec)[:, 0]
        if underflow:
            log_p = jnp.log(jax.nn.softmax(logits, axis=-1))
        else:
            log_p = jax.nn.log_softmax(logits, axis=-1)
        picked = jnp.take_along_axis(logits, jnp.broadcast_to(token, (n, 1)), axis=-1)
        ce = jax.nn.logsumexp(logits, axis=-1) - picked[:, 0]
        kl = jnp.sum(jnp.exp(log_p[:1]) * (log_p[:1] - log_p), axis=-1)
        return ce, kl

    size = max(_LOGIT_BYTES // (4 * n * spec.vocab_size), 1)
    ce, kl = jax.lax.map(piece, (rows.transpose(1, 0, 2), following), batch_size=size)
    ce, kl = (a.T.reshape(n, batch, time) for a in (ce, kl))
    return ce[:, :, :-1], kl
