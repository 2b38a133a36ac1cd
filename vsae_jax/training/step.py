"""One training step, and several in one dispatch: state in, state out."""

from collections.abc import Callable, Iterable
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Float, Int, Key

from vsae_jax.autoencoder import sae
from vsae_jax.autoencoder.objective import Info
from vsae_jax.autoencoder.penalties import PENALTIES, penalties_of
from vsae_jax.autoencoder.sparsity import compiler_options, dead_latents
from vsae_jax.config import SAEConfig, TrainConfig
from vsae_jax.config.fields import traced
from vsae_jax.training import gradient, native, optimizer
from vsae_jax.training.layout import normed, to_public, to_training

# The numbers of a run, by their flags' names; changing one does not recompile.
Numbers = dict[str, Array]


class Totals(NamedTuple):
    """Sums over the steps since the last line of metrics.jsonl, of the means in `Info`
    by name. `bad_step` is the first step whose loss was not finite, or -1."""

    steps: Int[Array, ""]
    bad_step: Int[Array, ""]
    sums: dict[str, Float[Array, ""]]


class TrainState(NamedTuple):
    """Everything that survives a step.

    step: the number of steps done.
    params, norm: the autoencoder's variables in the form of training/layout.py;
      `variables` gives them as everything else takes them.
    opt_state: Adam's.
    key: that of the noise; step t draws with fold_in(key, t).
    rows_since_fired: `[d_sae]`, rows seen since each latent was last above 0.
    """

    step: Int[Array, ""]
    params: dict[str, Array]
    norm: dict[str, Array]
    opt_state: Any
    key: Key[Array, ""]
    rows_since_fired: Int[Array, " d_sae"]
    totals: Totals


def hparams(config: TrainConfig) -> Numbers:
    """The numbers of a resolved config; the weight of a penalty that is off is 0."""
    values = traced(config)
    for penalty in PENALTIES.values():
        if not penalty.on(config):
            values[penalty.weight] = 0.0
    return {
        name: jnp.asarray(value, jnp.int32 if type(value) is int else jnp.float32)
        for name, value in values.items()
    }


def init_state(
    variables: dict[str, dict[str, Array]], key: Key[Array, ""], config: SAEConfig
) -> TrainState:
    """The state before the first step."""
    held = to_training(variables["params"])
    unit = config.decoder_norm == "unit"
    return TrainState(
        step=jnp.int32(0),
        params=held,
        norm=variables["norm"],
        opt_state=optimizer.adam(unit_norm_decoder=unit).init(held),
        key=key,
        rows_since_fired=jnp.zeros(config.d_sae, jnp.int32),
        totals=zero_totals(summed(config)),
    )


def variables(state: TrainState, config: SAEConfig) -> dict[str, dict[str, Array]]:
    """The autoencoder's variables, as `sae` and `losses` take them."""
    return {"params": _public(state.params, config=config), "norm": state.norm}


@partial(jax.jit, static_argnames="config")
def _public(held: dict[str, Array], *, config: SAEConfig) -> dict[str, Array]:
    return to_public(normed(held, config))


def summed(config: SAEConfig) -> list[str]:
    """The names of what a run adds up between two lines of its metrics."""
    return ["loss", "squared_error", "variance", "l0", *penalties_of(config)]


def zero_totals(names: Iterable[str]) -> Totals:
    """Sums of no steps."""
    return Totals(jnp.int32(0), jnp.int32(-1), {name: jnp.zeros(()) for name in names})


def train_step(
    state: TrainState,
    x: Float[Array, "batch d_model"],
    numbers: Numbers,
    *,
    config: SAEConfig,
    kernels: native.Kernels = "xla",
    axis: str | None = None,
) -> tuple[TrainState, Info]:
    """One optimizer step on raw activations `x`; `axis` is vmap's over arms."""
    held = normed(state.params, config)
    x_n = sae.normalise({"params": held, "norm": state.norm}, x)
    dead = dead_latents(state.rows_since_fired, numbers["dead_after_tokens"])
    any_dead = jnp.any(dead)
    if axis is not None:  # agreed between arms, or each would compute both branches
        any_dead = lax.psum(any_dead.astype(jnp.int32), axis) > 0
    by = native if kernels == "native" else gradient
    grads, info = by.gradient(
        held,
        x_n,
        jax.random.fold_in(state.key, state.step),
        optimizer.warmed(state.step, numbers),
        dead=dead,
        any_dead=any_dead,
        buffers=state.norm,
        config=config,
    )
    if kernels == "native":
        params, opt_state = native.updated(
            grads, state.opt_state, held, state.step, numbers, config=config
        )
    else:
        adam = optimizer.of_step(state.step, numbers, config)
        updates, opt_state = adam.update(grads, state.opt_state, held)
        params = optax.apply_updates(held, updates)
    # Saturates, so that it does not overflow in a run of over 2^31 rows.
    silent = jnp.minimum(state.rows_since_fired, 2**30) + len(x)
    state = state._replace(
        step=state.step + 1,
        params=params,
        norm={**state.norm, **info.buffers},
        opt_state=opt_state,
        rows_since_fired=jnp.where(info.fired, 0, silent),
        totals=_add(state.totals, info, state.step),
    )
    return state, info


def compile_steps(
    config: SAEConfig,
    *,
    kernels: native.Kernels = "xla",
    arms: int = 1,
    places: Any = None,
) -> Any:
    """The jitted `steps(state, rows [n_max, batch, d_model], n, numbers) -> state`,
    which donates the state and runs the first `n` batches; n is traced, so a run is
    traced once. With several arms, `state` and `numbers` have a leading axis over them.
    `places` are the shardings of the returned state; None on one device."""
    steps = _steps(config, kernels, arms)
    out = {} if places is None else {"out_shardings": places}
    options = compiler_options()
    return jax.jit(steps, donate_argnums=0, compiler_options=options, **out)


# JAX knows a function that it has traced and compiled by its identity: with one
# function a config, a second run in a process (a notebook's) starts at once.
@lru_cache(maxsize=16)
def _steps(config: SAEConfig, kernels: native.Kernels, arms: int) -> Callable[..., Any]:
    step = partial(train_step, config=config, kernels=kernels)
    if arms > 1:
        together = partial(train_step, config=config, axis="arms")
        step = jax.vmap(together, in_axes=(0, None, 0), axis_name="arms")

    def steps(state: TrainState, rows: Array, n: Array, numbers: Numbers) -> TrainState:
        return lax.fori_loop(0, n, lambda i, s: step(s, rows[i], numbers)[0], state)

    return steps


def _add(totals: Totals, info: Info, step: Int[Array, ""]) -> Totals:
    means = {**info._asdict(), **info.penalties}
    bad = (totals.bad_step < 0) & ~jnp.isfinite(info.loss)
    return Totals(
        steps=totals.steps + 1,
        bad_step=jnp.where(bad, step, totals.bad_step),
        sums={name: total + means[name] for name, total in totals.sums.items()},
    )
