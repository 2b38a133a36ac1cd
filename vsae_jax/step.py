"""One training step, and several in one dispatch: state in, state out."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Float, Int, Key

from vsae_jax import losses, optim, sae
from vsae_jax.config import SAEConfig, TrainConfig
from vsae_jax.sparsity import dead_latents


class Hparams(NamedTuple):
    """The numbers of a run, as arrays: changing one does not recompile."""

    k: Int[Array, ""]
    beta: Float[Array, ""]
    noise_std: Float[Array, ""]
    l1: Float[Array, ""]
    auxk: Float[Array, ""]
    lr: Float[Array, ""]
    lr_warmup_steps: Int[Array, ""]
    lr_decay_start: Int[Array, ""]
    kl_warmup_steps: Int[Array, ""]
    steps: Int[Array, ""]
    dead_after_tokens: Int[Array, ""]
    clip_norm: Float[Array, ""]
    adam_b1: Float[Array, ""]
    adam_b2: Float[Array, ""]
    adam_eps: Float[Array, ""]


_WHOLE = frozenset(
    "k lr_warmup_steps lr_decay_start kl_warmup_steps steps dead_after_tokens".split()
)


class Totals(NamedTuple):
    """Sums over the steps since the last line of metrics.jsonl.

    `bad_step` is the first step whose loss was not finite, or -1.
    """

    steps: Int[Array, ""]
    loss: Float[Array, ""]
    squared_error: Float[Array, ""]
    variance: Float[Array, ""]
    kl: Float[Array, ""]
    l1: Float[Array, ""]
    auxk: Float[Array, ""]
    l0: Float[Array, ""]
    bad_step: Int[Array, ""]


class TrainState(NamedTuple):
    """All that survives a step.

    step: steps done. params, norm: the autoencoder's variables. opt_state: Adam's.
    key: of the noise; step t draws with fold_in(key, t). rows_since_fired:
    `[d_sae]`, rows seen since each latent last had a value above 0.
    """

    step: Int[Array, ""]
    params: dict[str, Array]
    norm: dict[str, Array]
    opt_state: Any
    key: Key[Array, ""]
    rows_since_fired: Int[Array, " d_sae"]
    totals: Totals


def hparams(config: TrainConfig) -> Hparams:
    """The numbers of a resolved config; the weight of a penalty that is off is 0."""
    values = {name: getattr(config, name) for name in Hparams._fields}
    for penalty, weight in (("kl", "beta"), ("l1", "l1")):
        if config.penalty != penalty:
            values[weight] = 0.0
    return Hparams(
        **{
            name: jnp.asarray(value, jnp.int32 if name in _WHOLE else jnp.float32)
            for name, value in values.items()
        }
    )


def init_state(
    variables: dict[str, dict[str, Array]], key: Key[Array, ""], config: SAEConfig
) -> TrainState:
    """The state before the first step."""
    params = variables["params"]
    unit = config.decoder_norm == "unit"
    return TrainState(
        step=jnp.int32(0),
        params=params,
        norm=variables["norm"],
        opt_state=optim.adam(unit_norm_decoder=unit).init(params),
        key=key,
        rows_since_fired=jnp.zeros(config.d_sae, jnp.int32),
        totals=zero_totals(),
    )


def zero_totals() -> Totals:
    """Sums of no steps."""
    zeros = {name: jnp.zeros(()) for name in Totals._fields}
    return Totals(**zeros | {"steps": jnp.int32(0), "bad_step": jnp.int32(-1)})


def train_step(
    state: TrainState,
    x: Float[Array, "batch d_model"],
    hparams: Hparams,
    *,
    config: SAEConfig,
) -> tuple[TrainState, losses.Info]:
    """One optimizer step on raw activations `x`."""
    variables = {"params": state.params, "norm": state.norm}
    x_n = sae.normalise(variables, x, config=config)
    weights = losses.Weights(
        k=hparams.k,
        beta=optim.kl_weight(
            state.step, beta=hparams.beta, warmup=hparams.kl_warmup_steps
        ),
        noise_std=hparams.noise_std,
        l1=hparams.l1,
        auxk=hparams.auxk,
    )
    dead = dead_latents(state.rows_since_fired, hparams.dead_after_tokens)
    key = jax.random.fold_in(state.key, state.step)
    gradient = jax.value_and_grad(
        partial(losses.total_loss, config=config), has_aux=True
    )
    (_, info), grads = gradient(state.params, x_n, key, weights, dead)
    updates, opt_state = _optimizer(state.step, hparams, config).update(
        grads, state.opt_state, state.params
    )
    state = state._replace(
        step=state.step + 1,
        params=optax.apply_updates(state.params, updates),
        opt_state=opt_state,
        rows_since_fired=_count_silence(state.rows_since_fired, info.fired, len(x)),
        totals=_add(state.totals, info, state.step),
    )
    return state, info


def compile_steps(
    config: SAEConfig,
) -> Callable[[TrainState, Array, int, Hparams], TrainState]:
    """`steps(state, rows [n_max, batch, d_model], n, hparams) -> state`, jitted, the
    state donated: runs the first `n` (traced) batches, so a run has one trace."""

    def steps(state: TrainState, rows: Array, n: Array, hparams: Hparams) -> TrainState:
        def one(i: Array, state: TrainState) -> TrainState:
            return train_step(state, rows[i], hparams, config=config)[0]

        return lax.fori_loop(0, n, one, state)

    return jax.jit(steps, donate_argnums=0)


def _optimizer(step: Array, hparams: Hparams, config: SAEConfig):
    rate = optim.learning_rate(
        step,
        peak=hparams.lr,
        warmup=hparams.lr_warmup_steps,
        decay_start=hparams.lr_decay_start,
        steps=hparams.steps,
    )
    return optim.adam(
        learning_rate=rate,
        clip_norm=hparams.clip_norm,
        b1=hparams.adam_b1,
        b2=hparams.adam_b2,
        eps=hparams.adam_eps,
        unit_norm_decoder=config.decoder_norm == "unit",
    )


def _count_silence(rows_since_fired: Array, fired: Array, rows: int) -> Array:
    # Saturates, so that a run of over 2^31 rows does not wrap around.
    return jnp.where(fired, 0, jnp.minimum(rows_since_fired, 2**30) + rows)


def _add(totals: Totals, info: losses.Info, step: Int[Array, ""]) -> Totals:
    sums = {
        name: getattr(totals, name) + getattr(info, name)
        for name in Totals._fields
        if name in losses.Info._fields
    }
    bad = (totals.bad_step < 0) & ~jnp.isfinite(info.loss)
    bad_step = jnp.where(bad, step, totals.bad_step)
    return Totals(steps=totals.steps + 1, bad_step=bad_step, **sums)
