"""The penalties, which are added to the squared error: a row each in `PENALTIES`.

They are not reduced over the batch. A sparsifier may compute penalties of its own;
their rows here say which flag weighs them.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from vsae_jax.autoencoder import gate
from vsae_jax.autoencoder.arrays import Latents, Mask, PerRow, Rows
from vsae_jax.autoencoder.encoder import Params
from vsae_jax.autoencoder.matmul import affine
from vsae_jax.autoencoder.sae import Forward
from vsae_jax.autoencoder.sparsity import TopK, keep_top_k
from vsae_jax.config import SAEConfig, TrainConfig


class Batch(NamedTuple):
    """What a penalty may read: parameters, normalised rows, the pass over them, and the
    latents that AuxK may use, or None in a step in which none is dead."""

    params: Params
    x_n: Rows
    out: Forward
    dead: Bool[Array, " d_sae"] | None


class Penalty(NamedTuple):
    """A penalty.

    weight: the flag with its weight. on: whether a config has it. of: its value for
    each row, or None where it does not act on the batch. warms: whether its weight
    rises over `--kl_warmup_steps`.
    """

    weight: str
    on: Callable[[SAEConfig | TrainConfig], bool]
    of: Callable[[Batch, SAEConfig], PerRow | None]
    warms: bool = False


def squared_error(x: Rows, x_hat: Rows) -> PerRow:
    """||x - x_hat||_2^2: a sum over d_model, not a mean (Baker and Li, 2.1, 2.2)."""
    _same_shape(x, x_hat)
    return jnp.sum(jnp.square(x - x_hat), axis=-1)


def row_variance(x: Rows) -> Float[Array, ""]:
    """The mean over rows of sum_d (x - mean_batch x)^2."""
    return jnp.mean(squared_error(x, jnp.broadcast_to(jnp.mean(x, 0), x.shape)))


def gaussian_kl(
    mean: Latents, log_var: Latents | None = None, *, where: Mask | None = None
) -> PerRow:
    """KL(N(mean, s^2) || N(0, I)) = 1/2 sum_i (mean_i^2 + s_i^2 - 1 - log s_i^2).

    Baker and Li, 2.2.2. Without `log_var`, s is 1 and it is 1/2 sum_i mean_i^2. With
    `where`, the sum is over those latents only.
    """
    terms = jnp.square(mean)
    if log_var is not None:
        _same_shape(mean, log_var)
        terms = terms + jnp.exp(log_var) - 1 - log_var
    return 0.5 * jnp.sum(terms if where is None else jnp.where(where, terms, 0), -1)


def l1_norm(f: Latents) -> PerRow:
    """||f||_1 (Baker and Li, 2.1)."""
    return jnp.sum(jnp.abs(f), axis=-1)


def auxk_error(
    residual: Rows,
    mu: Latents,
    w_dec: Float[Array, "d_sae d_model"],
    dead: Bool[Array, " d_sae"],
    *,
    k_aux: int,
    method: TopK = "auto",
    dtype: Literal["float32", "bfloat16"] = "float32",
) -> PerRow:
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


def _kl(batch: Batch, config: SAEConfig) -> PerRow:
    where = batch.out.selected if config.kl_over == "selected" else None
    kl = gaussian_kl(batch.out.mu, batch.out.log_var, where=where)
    if config.kl_units == "loss":
        return kl
    # With a decoder of variance v the evidence is error / 2 v + d / 2 log v + KL. Times
    # 2 v, at the best v for this batch, that is the error plus 2 v KL.
    error = jnp.mean(squared_error(batch.x_n, batch.out.x_hat_n))
    return kl * 2 * lax.stop_gradient(error / batch.x_n.shape[1])


def _auxk(batch: Batch, config: SAEConfig) -> PerRow | None:
    if batch.dead is None:
        return None
    residual = batch.x_n - batch.out.x_hat_n
    error = auxk_error(
        residual,
        batch.out.mu,
        batch.params["w_dec"],
        batch.dead,
        k_aux=config.k_aux,
        method=config.top_k,
        dtype=config.dtype,
    )
    if config.auxk_units == "loss":
        return error
    return error / jnp.maximum(lax.stop_gradient(row_variance(residual)), 1e-12)


def _gate_error(batch: Batch, config: SAEConfig) -> PerRow:
    assert batch.out.g is not None  # a gate path has it
    x_hat = gate.reconstruction(batch.params, batch.out.g, config=config)
    return squared_error(batch.x_n, x_hat)


def _nested(batch: Batch, config: SAEConfig) -> PerRow:
    errors = [squared_error(batch.x_n, x_hat) for x_hat in batch.out.inner]
    return jnp.sum(jnp.stack(errors), axis=0)


def _has_path(config: SAEConfig | TrainConfig) -> bool:
    return config.gate == "path"


PENALTIES: dict[str, Penalty] = {
    "kl": Penalty("beta", lambda c: c.penalty == "kl", _kl, warms=True),
    "l0_loss": Penalty(
        "l0", lambda c: c.l0 > 0, lambda b, _: b.out.penalties["l0_loss"], warms=True
    ),
    "l1": Penalty("l1", lambda c: c.penalty == "l1", lambda b, _: l1_norm(b.out.f)),
    "auxk": Penalty("auxk", lambda c: c.auxk > 0, _auxk),
    "gate_l1": Penalty(
        "gate_l1", _has_path, lambda b, _: gate.l1_norm(b.out.g), warms=True
    ),
    "gate_error": Penalty("gate_error", _has_path, _gate_error),
    "nested": Penalty("nested", lambda c: c.prefixes != "none", _nested),
}


def penalties_of(config: SAEConfig) -> list[str]:
    """The names of the penalties that `config` has, sorted: the order in which they
    are added, the same in every process."""
    return sorted(name for name, penalty in PENALTIES.items() if penalty.on(config))


def _same_shape(a: Array, b: Array) -> None:
    if a.shape != b.shape:
        raise ValueError(f"shapes differ: {a.shape} and {b.shape}")
