"""The losses: pure, keyed and jitted.

    loss = sum_d (x - x_hat)^2 + beta * KL + l1 * |f|_1 + auxk * AuxK, mean over rows

x is in normalised units. The parts are not reduced over the batch. In a notebook:

    params = {"w_enc": ..., "b_enc": ..., "w_dec": ..., "b_dec": ...}
    loss, info = losses.vsae_topk_loss(params, x, key, k=64, beta=0.1)
"""

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
from jaxtyping import Array, Float, Key

from vsae_jax.autoencoder.objective import Info, total_loss
from vsae_jax.autoencoder.penalties import (
    auxk_error,
    gaussian_kl,
    l1_norm,
    squared_error,
)
from vsae_jax.config import SAEConfig

__all__ = [
    "Info",
    "auxk_error",
    "gaussian_kl",
    "l1_norm",
    "relu_loss",
    "squared_error",
    "topk_loss",
    "total_loss",
    "vsae_loss",
    "vsae_topk_loss",
]

Params = Mapping[str, Array]


@partial(jax.jit, static_argnames="k")
def topk_loss(
    params: Params, x: Float[Array, "batch d_model"], *, k: int
) -> tuple[Float[Array, ""], Info]:
    """||x - x_hat||^2 with f = TopK(relu(w_enc (x - b_dec) + b_enc)): Baker and Li,
    2.1."""
    config = _config(params, k=k, relu=True, noise=False, penalty="none")
    return total_loss(params, x, None, {"k": k}, config=config)


@jax.jit
def relu_loss(
    params: Params, x: Float[Array, "batch d_model"], *, l1: float
) -> tuple[Float[Array, ""], Info]:
    """||x - x_hat||^2 + l1 * ||f||_1 with f = relu(w_enc (x - b_dec) + b_enc)."""
    config = _config(params, sparsity="none", relu=True, noise=False, penalty="l1")
    return total_loss(params, x, None, {"l1": l1}, config=config)


@jax.jit
def vsae_loss(
    params: Params,
    x: Float[Array, "batch d_model"],
    key: Key[Array, ""],
    *,
    beta: float,
    noise_std: float = 1.0,
) -> tuple[Float[Array, ""], Info]:
    """||x - x_hat||^2 + beta * KL with f = z = mu + noise_std * s * eps: Baker and Li,
    2.2.

    A learned variance is used where params hold w_var and b_var. The key is consumed.
    """
    numbers = {"beta": beta, "noise_std": noise_std}
    return total_loss(params, x, key, numbers, config=_config(params, sparsity="none"))


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

    The paper's model (Baker and Li, 2.2). A learned variance is used where params hold
    w_var and b_var. The key is consumed.
    """
    numbers = {"k": k, "beta": beta, "noise_std": noise_std}
    return total_loss(params, x, key, numbers, config=_config(params, k=k))


def _config(params: Params, *, k: int = 1, **switches: Any) -> SAEConfig:
    d_model, d_sae = params["w_enc"].shape
    variance = "learned" if "w_var" in params else "fixed"
    start = SAEConfig(d_model=d_model, d_sae=d_sae, k=k, variance=variance)
    return dataclasses.replace(start, **switches)
