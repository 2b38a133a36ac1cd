"""Core: the language model's loss with the autoencoder spliced in, and reconstruction.

SAEBench's `core` (SAEBENCH.md 1) on one set of tokens:

    ce_loss_score = (CE_ablated - CE_sae) / (CE_ablated - CE_clean)     "loss recovered"
    kl_div_score  = (KL_ablated - KL_sae) / KL_ablated

A token counts where it is not special (BOS, EOS, padding) and has an activation row;
elsewhere the residual stays as it is. The ablation sets every position to 0.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from vsae_jax import progress, sae
from vsae_jax.config import SAEConfig
from vsae_jax.errors import UserError
from vsae_jax.evals import Subject
from vsae_jax.layer_norm import normalise_rows
from vsae_jax.lm import LanguageModel, identity, next_token_loss
from vsae_jax.metrics import (
    BatchSums,
    Reconstruction,
    batch_sums,
    density_histogram,
    ratio,
)
from vsae_jax.sae import Variables


class LossSums(NamedTuple):
    """Sums over a batch: cross-entropy in nats for (clean, SAE, ablated) and the number
    of predictions; KL from clean for (SAE, ablated) and the number of positions."""

    ce: Float[Array, " 3"]
    predictions: Float[Array, ""]
    kl: Float[Array, " 2"]
    positions: Float[Array, ""]


def run(subject: Subject) -> dict[str, Any]:
    """`{"metrics", "density_histogram", "config"}` of a run."""
    # A JAX model is a pytree of arrays; any other is one leaf, which jit cannot trace.
    traced = isinstance(jax.tree.leaves(subject.lm)[0], jax.Array)
    measure = _measure_jit if traced else _measure
    data, reconstruction, losses = subject.run.data, Reconstruction(), []
    with progress.bar(len(subject.tokens), unit="context") as bar:
        for tokens, keep, count in masked_batches(subject):
            sums, loss = measure(
                subject.lm,
                subject.run.variables,
                tokens,
                keep,
                config=subject.run.sae,
                layer=data["layer"],
                center=data["center_residual"],
                layer_norm=data.get("layer_norm", False),
            )
            reconstruction.add(jax.device_get(sums))
            losses.append(jax.device_get(loss))
            bar.update(count)
    return {
        "metrics": _loss_metrics(losses) | reconstruction.metrics(),
        "density_histogram": density_histogram(reconstruction.density),
        "config": subject.config,
    }


def _measure(
    lm: LanguageModel,
    variables: Variables,
    tokens: Int[Array | np.ndarray, "batch time"],
    keep: Bool[Array | np.ndarray, "batch time"],
    *,
    config: SAEConfig,
    layer: int,
    center: bool,
    layer_norm: bool,
) -> tuple[BatchSums, LossSums]:
    residual = jnp.asarray(lm.residual(tokens, layer))
    x, x_hat, f = _reconstruct(
        variables, residual, config=config, center=center, layer_norm=layer_norm
    )
    shift = residual.reshape(x.shape) - x
    spliced = (x_hat + shift).reshape(residual.shape)
    spliced = jnp.where(keep[..., None], spliced, residual)
    splices = (identity, lambda _: spliced, jnp.zeros_like)
    logits = lm.logits(tokens, layer=layer, splices=splices)
    return batch_sums(x, x_hat, f, keep.reshape(-1)), _loss_sums(
        *logits, tokens=tokens, keep=keep
    )


_measure_jit = jax.jit(
    _measure, static_argnames=("config", "layer", "center", "layer_norm")
)


@partial(jax.jit, static_argnames=("config", "center", "layer_norm"))
def _reconstruct(
    variables: Variables,
    residual: Float[Array, "batch time d_model"],
    *,
    config: SAEConfig,
    center: bool,
    layer_norm: bool,
) -> tuple[Array, Array, Array]:
    """x, x_hat and f of every position, `[batch * time, ...]`, as trained on."""
    x = residual.reshape(-1, residual.shape[-1])
    if center:
        x = x - jnp.mean(x, axis=-1, keepdims=True)
    if not layer_norm:
        f = sae.encode(variables, x, config=config)
        return x, sae.decode(variables, f, config=config), f
    x_in, mean, std = normalise_rows(x)
    f = sae.encode(variables, x_in, config=config)
    return x, sae.decode(variables, f, config=config) * std + mean, f


@jax.jit
def _loss_sums(
    clean: Float[Array, "batch time vocab"],
    spliced: Float[Array, "batch time vocab"],
    ablated: Float[Array, "batch time vocab"],
    *,
    tokens: Int[Array | np.ndarray, "batch time"],
    keep: Bool[Array | np.ndarray, "batch time"],
) -> LossSums:
    w = keep.astype(jnp.float32)
    log_p = jax.nn.log_softmax(clean)
    ce = [next_token_loss(logits, tokens) for logits in (clean, spliced, ablated)]
    # From log-probabilities: SAEBench takes the log of a softmax, which underflows.
    kl = [
        jnp.sum(jnp.exp(log_p) * (log_p - jax.nn.log_softmax(logits)), axis=-1)
        for logits in (spliced, ablated)
    ]
    return LossSums(
        ce=jnp.stack([jnp.sum(loss * w[:, :-1]) for loss in ce]),
        predictions=jnp.sum(w[:, :-1]),
        kl=jnp.stack([jnp.sum(divergence * w) for divergence in kl]),
        positions=jnp.sum(w),
    )


def _loss_metrics(batches: list[LossSums]) -> dict[str, float | None]:
    total = [np.sum(np.asarray(part, np.float64), axis=0) for part in zip(*batches)]
    if not total[1]:
        raise UserError(
            "nothing to predict: every token is special, without an activation row, or "
            "the last of its context; evaluate on more or other text"
        )
    clean, spliced, ablated = (float(ce) for ce in total[0] / total[1])
    kl, kl_ablated = (float(kl) for kl in total[2] / total[3])
    return {
        "ce_loss_score": ratio(ablated - spliced, ablated - clean),
        "ce_loss_without_sae": clean,
        "ce_loss_with_sae": spliced,
        "ce_loss_with_ablation": ablated,
        "kl_div_score": ratio(kl_ablated - kl, kl_ablated),
        "kl_div_with_sae": kl,
        "kl_div_with_ablation": kl_ablated,
    }


def masked_batches(subject: Subject) -> Iterator[tuple[np.ndarray, np.ndarray, int]]:
    """Tokens, the mask of those that count, and the number of contexts; the last batch
    is padded with contexts that do not count."""
    special = sorted(subject.lm.special_ids)
    for start in range(0, len(subject.tokens), subject.batch_size):
        tokens = subject.tokens[start : start + subject.batch_size]
        keep = ~np.isin(tokens, special)
        keep[:, : subject.run.data["dropped_positions"]] = False
        padding = ((0, subject.batch_size - len(tokens)), (0, 0))
        yield np.pad(tokens, padding), np.pad(keep, padding), len(tokens)
