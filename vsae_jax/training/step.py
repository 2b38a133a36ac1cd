"""One training step, and several in one dispatch: state in, state out."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Float, Int, Key

from vsae_jax import losses
from vsae_jax.autoencoder import sae
from vsae_jax.autoencoder.sparsity import compiler_options, dead_latents
from vsae_jax.config import SAEConfig, TrainConfig
from vsae_jax.system import mesh
from vsae_jax.training import optimizer


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


CPU_PART_BYTES = 2**25
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

    step: steps done. params, norm: the autoencoder's variables, the decoder held as
    `w_dec_t [d_model, d_sae]`, so that every matrix product of a step is of rows by
    rows (matmul.py), and before its columns are brought to norm 1, which the next
    step does first; `variables` gives them as they are used. opt_state: Adam's.
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
    params = dict(variables["params"])
    params[optimizer.DECODER] = jnp.array(params.pop("w_dec").T)
    unit = config.decoder_norm == "unit"
    return TrainState(
        step=jnp.int32(0),
        params=params,
        norm=variables["norm"],
        opt_state=optimizer.adam(unit_norm_decoder=unit).init(params),
        key=key,
        rows_since_fired=jnp.zeros(config.d_sae, jnp.int32),
        totals=zero_totals(),
    )


def variables(state: TrainState, config: SAEConfig) -> dict[str, dict[str, Array]]:
    """The autoencoder's variables, as `sae` and `losses` take them."""
    held = _held(state.params, config)
    return {"params": _params(held), "norm": state.norm}


def _held(params: dict[str, Array], config: SAEConfig) -> dict[str, Array]:
    unit = config.decoder_norm == "unit"
    return optimizer.unit_decoder(params) if unit else params


def _params(held: dict[str, Array]) -> dict[str, Array]:
    params = dict(held)
    params["w_dec"] = params.pop(optimizer.DECODER).T
    return params


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
    axis: str | None = None,
) -> tuple[TrainState, losses.Info]:
    """One optimizer step on raw activations `x`; `axis` is vmap's over arms."""
    held = _held(state.params, config)
    x_n = sae.normalise({"params": _params(held), "norm": state.norm}, x, config=config)
    weights = _weights(state.step, hparams)
    key = jax.random.fold_in(state.key, state.step)
    dead = dead_latents(state.rows_since_fired, hparams.dead_after_tokens)
    any_dead = jnp.any(dead)
    if axis is not None:  # the same for all arms, or each would take both branches
        any_dead = lax.psum(any_dead.astype(jnp.int32), axis) > 0

    def gradient(x: Array, first_row: Array | int) -> tuple[Any, losses.Info]:
        def loss(held: dict[str, Array], dead: Array | None):
            options = {"config": config, "first_row": first_row}
            return losses.total_loss(_params(held), x, key, weights, dead, **options)

        part = jax.grad(loss, has_aux=True)
        if not config.auxk:
            return part(held, None)
        # Where no latent is dead AuxK is left out, not multiplied by 0.
        return lax.cond(any_dead, lambda: part(held, dead), lambda: part(held, None))

    grads, info = _in_parts(gradient, x_n, config)
    updates, opt_state = _optimizer(state.step, hparams, config).update(
        grads, state.opt_state, held
    )
    state = state._replace(
        step=state.step + 1,
        params=optax.apply_updates(held, updates),
        opt_state=opt_state,
        rows_since_fired=_count_silence(state.rows_since_fired, info.fired, len(x)),
        totals=_add(state.totals, info, state.step),
    )
    return state, info


def _weights(step: Int[Array, ""], hparams: Hparams) -> losses.Weights:
    """The loss's numbers at this step: beta rises over its warm-up."""
    beta = optimizer.kl_weight(step, beta=hparams.beta, warmup=hparams.kl_warmup_steps)
    return losses.Weights(
        k=hparams.k,
        beta=beta,
        noise_std=hparams.noise_std,
        l1=hparams.l1,
        auxk=hparams.auxk,
    )


def _in_parts(
    gradient: Callable[[Array, Array | int], tuple[Any, losses.Info]],
    x: Float[Array, "batch d_model"],
    config: SAEConfig,
) -> tuple[Any, losses.Info]:
    """The mean of `gradient(rows, first_row)` over equal parts of the batch: on one CPU
    device as many rows as have their latents in cache, else all of them."""
    rows = math.gcd(len(x), max(CPU_PART_BYTES // (4 * config.d_sae), 1))
    by_batch = config.auxk and config.auxk_units == "variance"
    whole = by_batch or mesh.is_split() or rows < 128 or rows == len(x)
    if jax.default_backend() != "cpu" or whole:
        return gradient(x, 0)
    parts = len(x) // rows

    def add(i: Array, total: Any) -> Any:
        start = i * rows
        part = gradient(lax.dynamic_slice_in_dim(x, start, rows), start)
        return jax.tree.map(
            lambda a, b: a | b if a.dtype == bool else a + b / parts, total, part
        )

    shapes = jax.eval_shape(lambda: gradient(x[:rows], 0))
    zero = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)
    grads, info = lax.fori_loop(0, parts, add, zero)
    return grads, info._replace(variance=losses.row_variance(x))


def compile_steps(config: SAEConfig, *, arms: int = 1, places: Any = None) -> Any:
    """`steps(state, rows [n_max, batch, d_model], n, hparams) -> state`, jitted, the
    state donated: runs the first `n` (traced) batches, so a run has one trace. With
    several arms, `state` and `hparams` have a leading axis over them. `places` are the
    shardings of the state that is returned; None on one device."""
    step = partial(train_step, config=config)
    if arms > 1:
        together = partial(train_step, config=config, axis="arms")
        step = jax.vmap(together, in_axes=(0, None, 0), axis_name="arms")

    def steps(state: TrainState, rows: Array, n: Array, hparams: Hparams) -> TrainState:
        return lax.fori_loop(0, n, lambda i, s: step(s, rows[i], hparams)[0], state)

    kept = {} if places is None else {"out_shardings": places}
    options = compiler_options()
    return jax.jit(steps, donate_argnums=0, compiler_options=options, **kept)


def _optimizer(step: Array, hparams: Hparams, config: SAEConfig):
    rate = optimizer.learning_rate(
        step,
        peak=hparams.lr,
        warmup=hparams.lr_warmup_steps,
        decay_start=hparams.lr_decay_start,
        steps=hparams.steps,
    )
    return optimizer.adam(
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
