"""The autoencoder: plain functions of four to six arrays.

    x_n     = scale * (x - mean)
    mu      = (x_n - b_dec) @ w_enc + b_enc         encoder; b_dec where subtract_b_dec
    z       = mu + noise_std * s * eps              posterior; training only (noise_at:
                                                    or of the input, or of f)
    z       = z, or gate * z                        gate
    f       = top_k(z), or z                        sparsifier
    x_hat_n = f @ w_dec + b_dec                     decoder
    x_hat   = x_hat_n / scale + mean

Variables are a dict: `params` (w_enc [d_model, d_sae], b_enc, w_dec [d_sae, d_model],
b_dec [d_model], w_var and b_var of a learned variance, the gate's and the sparsifier's)
and `norm` (scale [], mean [d_model], and the sparsifier's buffers), which is saved with
them and never trained.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, Key

from vsae_jax.autoencoder import decoder, encoder, gate, posterior
from vsae_jax.autoencoder.arrays import ArraySpec, Latents, Mask, PerRow, Rows, ones
from vsae_jax.autoencoder.matmul import product
from vsae_jax.autoencoder.sparsifiers import SPARSIFIERS, Numbers, sparsifier_of
from vsae_jax.config import SAEConfig

Params = Mapping[str, Array]
Variables = Mapping[str, Mapping[str, Array]]

_NORM = {"scale": ArraySpec((), start=ones), "mean": ArraySpec(("d_model",))}
# What flax folds into the key of a module's first parameter, so that a seed gives the
# weights that it gave when flax made them.
_FIRST_PARAMETER = np.uint32(0xBF8B4530)


def arrays(config: SAEConfig) -> dict[str, ArraySpec]:
    """The arrays that are trained, by name, in the order in which they are made."""
    learned = posterior.ARRAYS if config.variance == "learned" else {}
    own = {**gate.ARRAYS[config.gate], **sparsifier_of(config).ARRAYS}
    return {**decoder.ARRAYS, **encoder.ARRAYS, **learned, **own}


def buffers(config: SAEConfig) -> dict[str, ArraySpec]:
    """The arrays that are saved with those and not trained, by name."""
    return {**_NORM, **sparsifier_of(config).BUFFERS}


def every_array() -> dict[str, ArraySpec]:
    """The arrays that an autoencoder can have, by name."""
    parts = [decoder.ARRAYS, encoder.ARRAYS, posterior.ARRAYS, *gate.ARRAYS.values()]
    parts.append(_NORM)
    for sparsifier in SPARSIFIERS.values():
        parts += [sparsifier.ARRAYS, sparsifier.BUFFERS]
    return {name: spec for part in parts for name, spec in part.items()}


def shapes(config: SAEConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every array of `sae.safetensors`, by name."""
    every = {**arrays(config), **buffers(config)}
    return {name: spec.shape(config) for name, spec in every.items()}


class Forward(NamedTuple):
    """One training pass over normalised rows. `log_var` is None without a learned
    variance, `g` without a gate path. `inner` are a nested decoder's reconstructions
    from its prefixes; `penalties` and `buffers` are the sparsifier's."""

    mu: Latents
    log_var: Latents | None
    g: Latents | None
    f: Latents
    selected: Mask
    x_hat_n: Rows
    inner: list[Rows]
    penalties: dict[str, PerRow]
    buffers: dict[str, Array]


def forward(
    params: Params,
    x_n: Rows,
    numbers: Numbers,
    *,
    config: SAEConfig,
    key: Key[Array, ""] | None = None,
    first_row: int | Int[Array, ""] = 0,
    buffers: Params | None = None,
) -> Forward:
    """Posterior, sample (with a key, which is consumed), gate, selection, x_hat.

    `numbers` holds k and noise_std, where they are needed. Where x_n is a part of a
    batch, `first_row` is its place there, for its part of the noise. `buffers` are the
    sparsifier's before this step.
    """

    def noisy(at: str, mu: Array, log_var: Latents | None = None) -> Array:
        if key is None or config.noise_at != at:
            return mu
        noise_std = numbers["noise_std"]
        return posterior.sample(
            key, mu, log_var, noise_std=noise_std, first_row=first_row
        )

    seen = noisy("input", x_n)
    mu, g = encoder.encoded(params, seen, config=config)
    log_var = posterior.log_variance(params, seen, config=config)
    z = noisy("latents", mu, log_var)
    z = gate.gated(z, g, log_var, config=config, training=True)
    own = {**params, **(buffers or {})}
    sparse = sparsifier_of(config).apply(z, own, numbers, config=config)
    widths = (*config.widths, config.d_sae)
    sent = sparse.f * noisy("kept", jnp.ones_like(mu))
    *inner, x_hat_n = decoder.prefixes(params, sent, widths, config=config)
    return Forward(
        mu=mu,
        log_var=log_var,
        g=g,
        f=sparse.f,
        selected=sparse.selected if g is None else sparse.selected & (g > 0),
        x_hat_n=x_hat_n,
        inner=inner,
        penalties=sparse.penalties,
        buffers=sparse.buffers,
    )


def normalise(variables: Variables, x: Rows) -> Rows:
    """x_n = scale * (x - mean), in float32."""
    norm = variables["norm"]
    return norm["scale"] * (x.astype(jnp.float32) - norm["mean"][None, :])


def pre_activations(variables: Variables, x: Rows, *, config: SAEConfig) -> Latents:
    """mu of raw rows, after the optional relu and before the optional gate."""
    x_n = normalise(variables, x)
    return encoder.encoded(variables["params"], x_n, config=config).mu


def encode(variables: Variables, x: Rows, *, config: SAEConfig) -> Latents:
    """Latents of raw activations, at the mean: no noise (docs/paper_and_code.md)."""
    params, x_n = variables["params"], normalise(variables, x)
    mu, g = encoder.encoded(params, x_n, config=config)
    log_var = None
    if config.gate == "sigma":
        log_var = posterior.log_variance(params, x_n, config=config)
    z = gate.gated(mu, g, log_var, config=config, training=False)
    own = {**params, **variables["norm"]}
    return sparsifier_of(config).encode(z, own, config=config)


def decode(variables: Variables, f: Latents, *, config: SAEConfig) -> Rows:
    """Raw activations from latents: x_hat = x_hat_n / scale + mean."""
    x_hat_n = decoder.reconstruct(variables["params"], f, config=config)
    return x_hat_n / variables["norm"]["scale"] + variables["norm"]["mean"][None, :]


def init(
    key: Key[Array, ""],
    config: SAEConfig,
    *,
    scale: float | Float[Array, ""] = 1.0,
    mean: Float[Array | np.ndarray, " d_model"] | None = None,
    b_dec: Float[Array, " d_model"] | None = None,
    **starts: float | Float[Array, ""],
) -> dict[str, dict[str, Array]]:
    """Variables at the start: decoder rows uniform on the sphere of radius 1, the
    encoder their transpose, biases 0 unless `b_dec` is given (in normalised units).
    `starts` are factors of the arrays' starts, by the flags that the arrays name in
    `ArraySpec.times`, such as decoder_init_norm. The key is consumed."""
    unknown = starts.keys() - {spec.times for spec in every_array().values()}
    if unknown:
        raise TypeError(f"no array starts by {sorted(unknown)}")
    key = jax.random.fold_in(key, _FIRST_PARAMETER)
    params: dict[str, Array] = {}
    for name, spec in arrays(config).items():
        start = spec.start(key, spec.shape(config), params)
        params[name] = start * starts.get(spec.times or "", 1.0)
    if b_dec is not None:
        params["b_dec"] = jnp.array(b_dec, jnp.float32)
    norm: dict[str, Array] = {}
    for name, spec in buffers(config).items():
        norm[name] = spec.start(key, spec.shape(config), norm)
    mean = jnp.zeros(config.d_model) if mean is None else jnp.asarray(mean)
    norm |= {"scale": jnp.float32(scale), "mean": mean.astype(jnp.float32)}
    return {"params": params, "norm": norm}


def fold(
    variables: Variables,
    config: SAEConfig,
    *,
    units: Literal["scaled", "raw"] = "scaled",
) -> tuple[dict[str, dict[str, Array]], SAEConfig]:
    """The same autoencoder with scale 1 and mean 0, and its config; made in float64.

    With s = scale, and latents multiplied by g:

        w_enc *= s g;  b_enc, thresholds *= g;  w_dec /= s g;  b_dec = b_dec / s + mean
        where b_dec is not subtracted: b_enc -= mean @ w_enc (the new one)
        w_var *= s;  b_var += 2 log g, and -= mean @ w_var as above

    A gate by sigma has no units: there b_var gets no 2 log g.

    `scaled` is SAELens' convention, g = 1: latents stay those of the scaled input. The
    decoder's rows then have norm 1 / s, so the config says `free`. `raw` is
    dictionary_learning's, g = 1 / s: the weights stay as they are, decoder rows keep
    norm 1, and latents get the units of x.
    """
    s = float(variables["norm"]["scale"])
    mean = np.asarray(variables["norm"]["mean"], np.float64)
    g = 1 / s if units == "raw" else 1.0
    weight = 1.0 if units == "raw" else s  # s g, without rounding
    held = {**variables["params"], **variables["norm"]}
    p = {n: np.asarray(a, np.float64) for n, a in held.items()}
    every = {**arrays(config), **buffers(config)}
    p |= {n: p[n] * g for n, spec in every.items() if spec.in_latents}
    p["w_enc"], p["w_dec"] = p["w_enc"] * weight, p["w_dec"] / weight
    p["b_dec"] = p["b_dec"] / s + mean
    if config.variance == "learned":
        units_of_latents = 0 if config.gate == "sigma" else 2 * math.log(g)
        p["w_var"], p["b_var"] = p["w_var"] * s, p["b_var"] + units_of_latents
    if not config.subtract_b_dec:
        p |= moved_input(p, -mean)
    p |= {"scale": np.ones(()), "mean": np.zeros_like(mean)}
    folded = {
        kind: {name: jnp.asarray(p[name], jnp.float32) for name in names}
        for kind, names in variables.items()
    }
    decoder_norm = config.decoder_norm if units == "raw" else "free"
    return folded, dataclasses.replace(config, decoder_norm=decoder_norm)


def moved_input(
    arrays: Mapping[str, np.ndarray], by: Float[np.ndarray, " d_model"]
) -> dict[str, np.ndarray]:
    """The biases with which an encoder does the same on an input from which `by` was
    subtracted."""
    moved = {
        bias: arrays[bias] + by @ arrays[weights]
        for bias, weights in (("b_enc", "w_enc"), ("b_var", "w_var"))
        if bias in arrays
    }
    if "b_mag" in arrays:
        by_weights = np.exp(arrays["r_mag"]) * (by @ arrays["w_enc"])
        moved["b_mag"] = arrays["b_mag"] + by_weights
    return moved


def geometric_median(x: Rows, *, steps: int = 100) -> Float[Array, " d_model"]:
    """The point with the least summed distance to the rows (Weiszfeld's iteration)."""

    def closer(_: Any, point: Array) -> Array:
        distance = jnp.linalg.norm(x - point[None, :], axis=1)
        weight = 1.0 / jnp.maximum(distance, 1e-6)
        return product(weight, x) / jnp.sum(weight)

    return lax.fori_loop(0, steps, closer, jnp.mean(x, axis=0))
