"""The losses: pure, keyed, and jitted where public.

    loss = sum_d (x - x_hat)^2 + beta * KL + l1 * |f|_1 + auxk * AuxK, mean over rows

x is in normalised units. Parts come unreduced over the batch. From a notebook:

    params = {"w_enc": ..., "b_enc": ..., "w_dec": ..., "b_dec": ...}
    loss, info = losses.vsae_topk_loss(params, x, key, k=64, beta=0.1)
"""

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key

from vsae_jax.autoencoder.matmul import affine, column_counts
from vsae_jax.autoencoder.sae import Forward, forward
from vsae_jax.autoencoder.sparsity import keep_top_k
from vsae_jax.config import SAEConfig

Params = Mapping[str, Array]


class Weights(NamedTuple):
    """The numbers of a loss; each may be traced."""

    k: Int[Array, ""] | int = 0
    beta: Float[Array, ""] | float = 0.0
    noise_std: Float[Array, ""] | float = 0.0
    l1: Float[Array, ""] | float = 0.0
    auxk: Float[Array, ""] | float = 0.0


class Info(NamedTuple):
    """What to look at: batch means of each part, and which latents fired.

    `variance` is sum_d (x - mean_batch x)^2, so 1 - squared_error / variance is the
    batch's explained variance.
    """

    loss: Float[Array, ""]
    squared_error: Float[Array, ""]
    variance: Float[Array, ""]
    kl: Float[Array, ""]
    l1: Float[Array, ""]
    auxk: Float[Array, ""]
    l0: Float[Array, ""]
    fired: Bool[Array, " d_sae"]


def squared_error(
    x: Float[Array, "batch d_model"], x_hat: Float[Array, "batch d_model"]
) -> Float[Array, " batch"]:
    """||x - x_hat||_2^2: a sum over d_model, not a mean (paper 2.1, 2.2)."""
    _same_shape(x, x_hat)
    return jnp.sum(jnp.square(x - x_hat), axis=-1)


def gaussian_kl(
    mean: Float[Array, "batch d_sae"],
    log_var: Float[Array, "batch d_sae"] | None = None,
    *,
    where: Bool[Array, "batch d_sae"] | None = None,
) -> Float[Array, " batch"]:
    """KL(N(mean, s^2) || N(0, I)) = 1/2 sum_i (mean_i^2 + s_i^2 - 1 - log s_i^2).

    Paper 2.2.2. Without `log_var` s is 1 and it is 1/2 sum_i mean_i^2. `where` sums
    over those latents only.
    """
    terms = jnp.square(mean)
    if log_var is not None:
        _same_shape(mean, log_var)
        terms = terms + jnp.exp(log_var) - 1 - log_var
    return 0.5 * jnp.sum(terms if where is None else jnp.where(where, terms, 0), -1)


def l1_norm(f: Float[Array, "batch d_sae"]) -> Float[Array, " batch"]:
    """||f||_1 (paper 2.1)."""
    return jnp.sum(jnp.abs(f), axis=-1)


def auxk_error(
    residual: Float[Array, "batch d_model"],
    mu: Float[Array, "batch d_sae"],
    w_dec: Float[Array, "d_sae d_model"],
    dead: Bool[Array, " d_sae"],
    *,
    k_aux: int,
    method: Literal["auto", "lax"] = "auto",
    dtype: Literal["float32", "bfloat16"] = "float32",
) -> Float[Array, " batch"]:
    """||sg(x - x_hat) - f_aux @ w_dec||_2^2 (Gao et al. 2024, appendix A.2).

    f_aux are the `k_aux` largest of the dead latents' relu(mu), without b_dec. The
    residual is a target, so no gradient reaches the main reconstruction. 0 when no
    latent is dead (a training step then leaves all of it out).
    """
    candidates = jnp.where(dead[None, :], jax.nn.relu(mu), 0.0)
    f_aux, _ = keep_top_k(candidates, k_aux, k_max=k_aux, method=method)
    x_aux = affine(f_aux, w_dec, jnp.zeros(w_dec.shape[1]), dtype)
    error = squared_error(lax.stop_gradient(residual), x_aux)
    return jnp.where(jnp.any(dead), error, 0.0)


def total_loss(
    params: Params,
    x: Float[Array, "batch d_model"],
    key: Key[Array, ""] | None,
    weights: Weights,
    dead: Bool[Array, " d_sae"] | None = None,
    *,
    config: SAEConfig,
    first_row: int | Int[Array, ""] = 0,
) -> tuple[Float[Array, ""], Info]:
    """The weighted mean of the parts that `config` switches on, and what they were.

    `x` is normalised; `key` is consumed, and unused where `config.noise` is False;
    `dead` are the latents AuxK may use, `first_row` is as in `sae.forward`. Changes no
    state.
    """
    out = forward(
        params,
        x,
        config=config,
        k=weights.k,
        noise_std=weights.noise_std,
        key=key if config.noise else None,
        first_row=first_row,
    )
    parts = _parts(params, x, out, dead, config=config)
    weight = {"kl": weights.beta, "l1": weights.l1, "auxk": weights.auxk}
    loss = jnp.mean(parts["squared_error"])
    for name in weight.keys() & parts.keys():
        loss = loss + weight[name] * jnp.mean(parts[name])
    return loss, _info(loss, parts, x, out.f)


@partial(jax.jit, static_argnames="k")
def topk_loss(
    params: Params, x: Float[Array, "batch d_model"], *, k: int
) -> tuple[Float[Array, ""], Info]:
    """||x - x_hat||^2 with f = TopK(relu(w_enc (x - b_dec) + b_enc)): paper 2.1."""
    config = _config(params, k=k, relu=True, noise=False, penalty="none")
    return total_loss(params, x, None, Weights(k=k), config=config)


@jax.jit
def relu_loss(
    params: Params, x: Float[Array, "batch d_model"], *, l1: float
) -> tuple[Float[Array, ""], Info]:
    """||x - x_hat||^2 + l1 * ||f||_1 with f = relu(w_enc (x - b_dec) + b_enc)."""
    config = _config(params, sparsity="none", relu=True, noise=False, penalty="l1")
    return total_loss(params, x, None, Weights(l1=l1), config=config)


@jax.jit
def vsae_loss(
    params: Params,
    x: Float[Array, "batch d_model"],
    key: Key[Array, ""],
    *,
    beta: float,
    noise_std: float = 1.0,
) -> tuple[Float[Array, ""], Info]:
    """||x - x_hat||^2 + beta * KL with f = z = mu + noise_std * s * eps: paper 2.2.

    A learned variance is used where params hold w_var and b_var. The key is consumed.
    """
    config = _config(params, sparsity="none")
    weights = Weights(beta=beta, noise_std=noise_std)
    return total_loss(params, x, key, weights, config=config)


@partial(jax.jit, static_argnames="k")
def vsae_topk_loss(
    params: Params,
    x: Float[Array, "batch d_model"],
    key: Key[Array, ""],
    *,
    k: int,
    beta: float,
    noise_std: float = 1.0,
) -> tuple[Float[Array, ""], Info]:
    """||x - x_hat||^2 + beta * KL with f = TopK(z), z = mu + noise_std * s * eps.

    The paper's model (2.2). A learned variance is used where params hold w_var and
    b_var. The key is consumed.
    """
    config = _config(params, k=k)
    weights = Weights(k=k, beta=beta, noise_std=noise_std)
    return total_loss(params, x, key, weights, config=config)


def _parts(
    params: Params, x: Array, out: Forward, dead: Array | None, *, config: SAEConfig
) -> dict[str, Float[Array, " batch"]]:
    parts = {"squared_error": squared_error(x, out.x_hat_n)}
    if config.penalty == "kl":
        where = out.selected if config.kl_over == "selected" else None
        parts["kl"] = gaussian_kl(out.mu, out.log_var, where=where)
    if config.penalty == "l1":
        parts["l1"] = l1_norm(out.f)
    if config.auxk and dead is not None:
        residual = x - out.x_hat_n
        error = auxk_error(
            residual,
            out.mu,
            params["w_dec"],
            dead,
            k_aux=config.k_aux,
            method=config.top_k,
            dtype=config.dtype,
        )
        if config.auxk_units == "variance":
            error = error / jnp.maximum(
                lax.stop_gradient(row_variance(residual)), 1e-12
            )
        parts["auxk"] = error
    return parts


def _info(loss: Array, parts: Mapping[str, Array], x: Array, f: Array) -> Info:
    mean = {name: jnp.mean(part) for name, part in parts.items()}
    zero = jnp.zeros(())
    return Info(
        loss=loss,
        squared_error=mean["squared_error"],
        variance=row_variance(x),
        kl=mean.get("kl", zero),
        l1=mean.get("l1", zero),
        auxk=mean.get("auxk", zero),
        l0=jnp.mean(jnp.sum(f != 0, axis=-1, dtype=jnp.int32)),
        fired=column_counts(f > 0) > 0,
    )


def row_variance(x: Float[Array, "batch d_model"]) -> Float[Array, ""]:
    """The mean over rows of sum_d (x - mean_batch x)^2."""
    return jnp.mean(squared_error(x, jnp.broadcast_to(jnp.mean(x, 0), x.shape)))


def _config(params: Params, *, k: int = 1, **switches) -> SAEConfig:
    d_model, d_sae = params["w_enc"].shape
    variance = "learned" if "w_var" in params else "fixed"
    start = SAEConfig(d_model=d_model, d_sae=d_sae, k=k, variance=variance)
    return dataclasses.replace(start, **switches)


def _same_shape(a: Array, b: Array) -> None:
    if a.shape != b.shape:
        raise ValueError(f"shapes differ: {a.shape} and {b.shape}")
