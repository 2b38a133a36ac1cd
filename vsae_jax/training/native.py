"""A gradient for CPUs that touches only k of d_sae latents, and Adam in one pass over
each matrix. `gradient.py` and `optimizer.py` are the references, with which they have
to agree.

Only the encoder's product is dense. The rest are the kernels of native_kernels.py,
machine code made by numba, an optional package. The KL's gradient is dense but needs no
product with the latents of a batch: with c its rows minus their mean m, and
mu = x w + b,

    sum over rows of x' mu = c' c w + batch m mu(m)
"""

import dataclasses
import functools
import importlib.util
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key

from vsae_jax.autoencoder import encoder, noise
from vsae_jax.autoencoder.arrays import Rows
from vsae_jax.autoencoder.matmul import affine, by_rows, column_sums
from vsae_jax.autoencoder.objective import Info
from vsae_jax.autoencoder.penalties import row_variance
from vsae_jax.autoencoder.sparsifiers import Numbers
from vsae_jax.config import SAEConfig
from vsae_jax.system.errors import UserError, one_line
from vsae_jax.training import gradient as by_xla
from vsae_jax.training import optimizer
from vsae_jax.training.layout import DECODER

Kernels = Literal["xla", "native"]

_TARGET = "vsae_jax_native"
_ROWS, _SELECT, _LISTS, _DECODE, _SUMS, _SLOPES, _ADAM = range(7)
# XLA's dense products are faster where k is more than this share of d_sae, by the
# operands' dtype. With fewer latents than this in a batch, compiling costs more than it
# saves.
_MOST = {"float32": 1 / 8, "bfloat16": 1 / 32}
_LEAST_LATENTS = 2**19


class Choice(NamedTuple):
    """The kernels that a run uses, and a note on them, or ""."""

    kernels: Kernels
    note: str


def choice(
    asked: Literal["auto", "xla", "native"],
    config: SAEConfig,
    *,
    batch_size: int,
    together: bool,
) -> Choice:
    """The kernels of a run; `together`: whether several devices or arms share a step.
    Refuses `native` where numba is missing."""
    by_xla = Choice("xla", "")
    if asked == "xla":
        return by_xla
    missing = _missing()
    if missing and asked == "native":
        raise UserError(f"--kernels=native: {missing}; or use --kernels=xla")
    uncovered = _uncovered(config, together=together)
    few = config.k <= _MOST[config.dtype] * config.d_sae
    if asked == "auto" and (
        missing or uncovered or not few or batch_size * config.d_sae < _LEAST_LATENTS
    ):
        return by_xla
    if uncovered:
        return Choice("xla", f"XLA's kernels: the native ones lack {uncovered}")
    if broken := _broken():
        if asked == "native":
            raise UserError(f"--kernels=native: {broken}; or use --kernels=xla")
        return Choice("xla", f"XLA's kernels: {broken}")
    auxk = "; steps in which AuxK acts are XLA's" if config.auxk else ""
    return Choice("native", f"native kernels{auxk}")


def _missing() -> str:
    if jax.default_backend() != "cpu":
        return f"they are for CPUs, and this is a {jax.default_backend()}"
    if importlib.util.find_spec("numba") is None:
        return "they need numba, which pip install -e '.[native]' brings"
    return ""


def _broken() -> str:
    """What keeps the kernels from being loaded here, or ""."""
    try:
        load()
    except Exception as error:  # numba and XLA's FFI raise errors of many kinds
        return f"the native ones cannot be loaded ({one_line(error)})"
    return ""


def _uncovered(config: SAEConfig, *, together: bool) -> str:
    """What the kernels lack that a config needs, or ""."""
    kl, sizes = config.penalty == "kl", (config.d_model, config.d_sae)
    known = {
        f"d_model {sizes[0]} and d_sae {sizes[1]}, which must be multiples of 16": (
            all(size % 16 == 0 for size in sizes)
        ),
        "several devices or arms in a step": not together,
        f"sparsity {config.sparsity}": config.sparsity == "topk",
        f"top_k={config.top_k}": config.top_k == "auto",
        f"selection={config.selection}": config.selection == "value",
        "a learned variance": config.variance == "fixed",
        f"noise_at={config.noise_at}": not config.noise or config.noise_at == "latents",
        "a gate": config.gate == "none",
        "prefixes": config.prefixes == "none",
        "an L1 penalty": config.penalty != "l1",
        "a relu with noise or a KL": not (config.relu and (config.noise or kl)),
        f"kl_over={config.kl_over}": not kl or config.kl_over == "all",
        f"kl_units={config.kl_units}": not kl or config.kl_units == "loss",
    }
    return ", ".join(what for what, is_known in known.items() if not is_known)


def gradient(
    held: dict[str, Array],
    x_n: Rows,
    key: Key[Array, ""],
    numbers: Numbers,
    *,
    dead: Bool[Array, " d_sae"],
    any_dead: Bool[Array, ""],
    buffers: dict[str, Array],
    config: SAEConfig,
) -> tuple[dict[str, Array], Info]:
    """What `gradient.gradient` returns, for a config that `choice` allows. Where AuxK
    acts, that function computes it."""
    load()
    if not config.auxk:
        return _sparse(held, x_n, key, numbers, config=config)
    dense = functools.partial(
        by_xla.gradient, dead=dead, any_dead=any_dead, buffers=buffers, config=config
    )
    return lax.cond(
        any_dead,
        lambda: dense(held, x_n, key, numbers),
        lambda: _sparse(held, x_n, key, numbers, config=config),
    )


def _sparse(
    held: dict[str, Array],
    x_n: Rows,
    key: Key[Array, ""],
    numbers: Numbers,
    *,
    config: SAEConfig,
) -> tuple[dict[str, Array], Info]:
    n, b_dec = len(x_n), held["b_dec"]
    x_in = x_n - b_dec[None, :] if config.subtract_b_dec else x_n
    # k, and whether there is a relu: then values not above 0 have no gradient.
    k = jnp.stack([jnp.asarray(numbers["k"], jnp.int32), jnp.int32(config.relu)])
    index, value = _selected(held, x_n, key, numbers, k, config=config)
    w_dec = _rows(held[DECODER], config.dtype)
    lists = _lists(index, value, k, d_sae=config.d_sae)
    g, dz = _decoded(x_n, w_dec, b_dec, index, value, k)
    error = jnp.mean(jnp.sum(jnp.square(g * (n / 2)), axis=-1))
    d_enc, d_bias = _summed(lists, x_in.astype(config.dtype), dz)
    d_dec, _ = _summed(lists, g.astype(config.dtype), value)
    loss, penalties = error, {"auxk": jnp.zeros(())} if config.auxk else {}
    if config.penalty == "kl":
        kl, of_enc, of_bias = _kl(held, x_in, config=config)
        loss, penalties = loss + numbers["beta"] * kl, penalties | {"kl": kl}
        d_enc, d_bias = (
            d + numbers["beta"] * of for d, of in ((d_enc, of_enc), (d_bias, of_bias))
        )
    d_b_dec = column_sums(g)
    if config.subtract_b_dec:
        d_b_dec = d_b_dec - held["w_enc"] @ d_bias
    grads = {"w_enc": d_enc, "b_enc": d_bias, DECODER: d_dec, "b_dec": d_b_dec}
    return grads, Info(
        loss=loss,
        squared_error=error,
        variance=row_variance(x_n),
        l0=jnp.mean(jnp.sum(value != 0, axis=-1, dtype=jnp.int32)),
        penalties=penalties,
        fired=lists.fired,
        buffers={},
    )


def updated(
    grads: dict[str, Array],
    opt_state: Any,
    held: dict[str, Array],
    step: Int[Array, ""],
    numbers: Numbers,
    *,
    config: SAEConfig,
) -> tuple[dict[str, Array], Any]:
    """The parameters and the optimizer's state after a step: what `optimizer.of_step`
    gives, with one pass over each matrix and one over its gradient. `slopes` are minus
    the parts of the gradient along (unit) decoder rows."""
    load()
    mu, nu, count = (optax.tree.get(opt_state, name) for name in ("mu", "nu", "count"))
    count, b1, b2 = count + 1, numbers["adam_b1"], numbers["adam_b2"]
    slopes: dict[str, Array] = {}
    squares = jnp.float32(0)
    for name, g in grads.items():
        if g.ndim < 2:
            squares += jnp.sum(jnp.square(g))
        elif name == DECODER and config.decoder_norm == "unit":
            # Only what turns a decoder row is left: |g - a w|^2 = g^2 - 2 a g w + ...
            gg, a, ww = _call(_SLOPES, [_of((3, g.shape[1]))], g, held[name])[0]
            slopes[name] = -a
            squares += jnp.sum(gg + (ww - 2) * jnp.square(a))
        else:
            slopes[name] = jnp.zeros(g.shape[1])
            squares += jnp.sum(_call(_SLOPES, [_of((3, g.shape[1]))], g, g)[0][0])
    factor = jnp.minimum(1.0, numbers["clip_norm"] / jnp.sqrt(squares))
    rate = optimizer.rate_of_step(step, numbers) / (1 - b1**count)
    of_step = factor, rate, 1 / (1 - b2**count), b1, b2, numbers["adam_eps"]
    found: dict[str, tuple[Array, Array, Array]] = {}
    for name, g in grads.items():
        arrays = held[name], g, mu[name], nu[name]
        found[name] = (
            _by_adam(*arrays, slopes[name], jnp.stack(of_step))
            if name in slopes
            else _adam(*arrays, of_step)
        )
    params, mu, nu = ({n: each[i] for n, each in found.items()} for i in range(3))
    return params, optax.tree.set(opt_state, mu=mu, nu=nu, count=count)


def _by_adam(
    w: Array, g: Array, mu: Array, nu: Array, slope: Array, of_step: Array
) -> tuple[Array, Array, Array]:
    out, in_place = [_of(w.shape)] * 3, {0: 0, 2: 1, 3: 2}
    w, mu, nu = _call(_ADAM, out, w, g, mu, nu, slope, of_step, in_place=in_place)
    return w, mu, nu


def _adam(
    w: Array, g: Array, mu: Array, nu: Array, of_step: tuple[Array, ...]
) -> tuple[Array, Array, Array]:
    """As the kernel, of a vector."""
    factor, rate, of_nu, b1, b2, eps = of_step
    x = factor * g
    mu, nu = (1 - b1) * x + b1 * mu, (1 - b2) * jnp.square(x) + b2 * nu
    return w - rate * mu / (jnp.sqrt(nu * of_nu) + eps), mu, nu


def _kl(
    held: dict[str, Array], x_in: Rows, *, config: SAEConfig
) -> tuple[Array, Array, Array]:
    """The mean KL over rows, and its gradients for w_enc and b_enc."""
    n, w = len(x_in), held["w_enc"]
    mean = jnp.mean(x_in, axis=0)
    centred = (x_in - mean[None, :]).astype(config.dtype)
    none = jnp.zeros(config.d_model)
    moments = affine(by_rows(centred.T), centred, none, config.dtype) / n
    product = affine(moments, w, jnp.zeros(config.d_sae), config.dtype)
    mean_mu = mean @ w + held["b_enc"]
    kl = 0.5 * (jnp.sum(jnp.sum(w * product, axis=0)) + jnp.sum(jnp.square(mean_mu)))
    return kl, product + mean[:, None] * mean_mu[None, :], mean_mu


def _selected(
    held: dict[str, Array],
    x_n: Rows,
    key: Key[Array, ""],
    numbers: Numbers,
    k: Int[Array, "2"],
    *,
    config: SAEConfig,
) -> tuple[Int[Array, "batch k"], Float[Array, "batch k"]]:
    """Each row's k latents by index, and their values; 0 from place k on. Computed in
    parts of the batch, so that latents stay in cache."""
    # The kernel adds the bias and the noise and takes the relu, which saves passes.
    none = jnp.zeros(config.d_sae)
    params = {**held, "w_enc": held["w_enc"].astype(config.dtype), "b_enc": none}
    linear = dataclasses.replace(config, relu=False)
    rows = by_xla.rows_of_a_part(len(x_n), config.d_sae)
    std = numbers["noise_std"] if config.noise else jnp.float32(0)
    of_rows, of_latents = noise.words(key, (len(x_n), config.d_sae))

    def part(first_row: Array) -> list[Array]:
        here, words = (
            lax.dynamic_slice_in_dim(a, first_row, rows) for a in (x_n, of_rows)
        )
        mu = encoder.encoded(params, here, config=linear).mu
        drawn = noise.Words(words, of_latents)
        return select(mu, held["b_enc"], k, drawn, std, k_max=config.k)

    index, value = lax.map(part, jnp.arange(0, len(x_n), rows, dtype=jnp.int32))
    return index.reshape(-1, config.k), value.reshape(-1, config.k)


def select(
    z: Float[Array, "n d_sae"],
    bias: Float[Array, " d_sae"],
    k: Int[Array, "2"],
    words: noise.Words,
    std: Float[Array, ""],
    *,
    k_max: int,
) -> list[Array]:
    """Each row's k[0] largest values of z + bias + std eps and their indices, by index,
    chosen as by `jax.lax.top_k`; eps is the noise of these words. Where k[1] is 1,
    negative values are set to 0. The other places up to k_max are 0."""
    load()
    shape = len(z), k_max
    out = [_of(shape, jnp.int32), _of(shape)]
    return _call(_SELECT, out, z, bias, k, *words, std.reshape(1))


class _Lists(NamedTuple):
    """Which rows selected each latent: where its list starts, all lists of
    `[row, place]` one after another, and which latents had a value above 0."""

    start: Int[Array, "d_sae+1 1"]
    pairs: Int[Array, "values 2"]
    fired: Bool[Array, " d_sae"]


def _lists(index: Array, value: Array, k: Array, *, d_sae: int) -> _Lists:
    start, pairs = _of((d_sae + 1, 1), jnp.int32), _of((index.size, 2), jnp.int32)
    out = [start, pairs, _of((d_sae,), jnp.bool_)]
    return _Lists(*_call(_LISTS, out, index, value, k))


def _rows(w: Float[Array, "n m"], dtype: Any) -> Float[Array, "m n"]:
    return _call(_ROWS, [_of(w.shape[::-1], dtype)], w)[0]


def _decoded(
    x: Array, w_dec: Array, b_dec: Array, index: Array, value: Array, k: Array
) -> list[Array]:
    """The gradients of the mean squared error for x_hat and each selected latent."""
    out = [_of(x.shape), _of(value.shape)]
    return _call(_DECODE, out, x, w_dec, b_dec, index, value, k)


def _summed(lists: _Lists, rows: Rows, weight: Float[Array, "batch k"]) -> list[Array]:
    """For each latent the weighted sum of the rows that selected it, as a column, and
    the sum of the weights."""
    d_sae = len(lists.fired)
    out = [_of((rows.shape[1], d_sae)), _of((d_sae,))]
    return _call(_SUMS, out, lists.start, lists.pairs, rows, weight.reshape(-1, 1))


def _of(shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def _call(
    kernel: int,
    out: list[Any],
    *operands: Array,
    in_place: dict[int, int] | None = None,
) -> list[Array]:
    call = jax.ffi.ffi_call(_TARGET, out, input_output_aliases=in_place)
    return list(call(*operands, kernel=np.int32(kernel)))


@functools.cache
def load() -> None:
    """Compiles the kernels, or reads those compiled before, and registers them with
    XLA; once per process."""
    from vsae_jax.training import native_kernels

    capsule = jax.ffi.pycapsule(native_kernels.call.address)
    jax.ffi.register_ffi_target(_TARGET, capsule, platform="cpu")
