"""Linear probes: one trainer for all evaluations, jitted, many probes at once.

SAEBench's torch probe (docs/saebench.md 2.3): one linear unit, binary cross-entropy,
AdamW, minibatches from a new permutation every epoch, an optional L1, and the weights
of the first epoch with the best accuracy on a validation sample. Theirs validates on
the test sample; ours on a part of the training sample unless the caller says otherwise.
"""

import dataclasses
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, Key

from vsae_jax.autoencoder.matmul import product
from vsae_jax.evals.sampling import Sample


@dataclass(frozen=True)
class Recipe:
    """How a probe is trained.

    l1: weight of the mean over outputs of |w|_1. coupled: the decay is an L2 in the
    gradient (Adam) and not AdamW's. end_lr: the rate falls by a constant factor every
    epoch, towards this. patience: epochs without a better accuracy before it stops.
    """

    lr: float
    batch_size: int
    epochs: int
    patience: int = 10**6
    l1: float = 0.0
    weight_decay: float = 0.01
    coupled: bool = False
    end_lr: float | None = None

    def with_steps_of(self, rows: int, *, n: int) -> "Recipe":
        """The recipe for `n` rows that takes as many steps as this one on `rows` rows;
        the patience grows likewise."""
        more = max(rows / n, 1.0)
        return dataclasses.replace(
            self, epochs=round(self.epochs * more), patience=round(self.patience * more)
        )


# Sparse probing; SCR and TPP (whose batch size says how strong a shortcut is learned).
ALL_LATENTS = Recipe(lr=1e-2, batch_size=250, epochs=100, patience=10)
SHORTCUT = Recipe(lr=1e-3, batch_size=16, epochs=20, patience=20, l1=1e-3)


class Probe(NamedTuple):
    """w `[..., d, outputs]`, b `[..., outputs]`; a logit above 0 says yes."""

    w: Float[Array | np.ndarray, "*probes d outputs"]
    b: Float[Array | np.ndarray, "*probes outputs"]


class _State(NamedTuple):
    epoch: Int[Array, ""]
    probe: Probe
    optimizer: Any
    best: Probe
    accuracy: Float[Array, ""]
    waited: Int[Array, ""]


def fit(
    x: Float[Array | np.ndarray, "rows d"],
    samples: list[Sample],
    validations: list[Sample],
    *,
    recipe: Recipe,
    key: Key[Array, ""],
) -> Probe:
    """A probe per sample, w `[probes, d]` and b `[probes]`, of the epoch with the best
    accuracy on its validation sample. All samples have the same size."""
    train, validation = _stacked(samples), _stacked(validations)
    keys = jax.random.split(key, len(samples))
    probe = _fit_each(jnp.asarray(x), *train, *validation, keys, recipe=recipe)
    return Probe(probe.w[..., 0], probe.b[..., 0])


def fit_outputs(
    x: Float[Array | np.ndarray, "rows d"],
    labels: Float[np.ndarray, "rows outputs"],
    *,
    recipe: Recipe,
    key: Key[Array, ""],
) -> Probe:
    """One probe of many outputs, of the last epoch; positives of an output weigh
    n_negative / n_positive (docs/saebench.md 6.3)."""
    wanted = jnp.asarray(labels, jnp.float32)
    positives = wanted.sum(axis=0)
    weight = (len(wanted) - positives) / jnp.maximum(positives, 1.0)
    return _fit_last(jnp.asarray(x), wanted, weight, key, recipe=recipe)


def accuracy(logits: Float[np.ndarray, " rows"], sample: Sample) -> float:
    """The share of a sample's rows on the right side; logits are of its rows."""
    return float(np.mean((logits > 0) == (sample.labels > 0.5)))


def _stacked(samples: list[Sample]) -> tuple[Array, Array]:
    rows, labels = (np.stack(part) for part in zip(*samples, strict=True))
    return jnp.asarray(rows), jnp.asarray(labels, jnp.float32)[..., None]


@partial(jax.jit, static_argnames=("recipe",))
def _fit_each(
    x: Float[Array, "rows d"],
    rows: Int[Array, "probes n"],
    labels: Float[Array, "probes n 1"],
    val_rows: Int[Array, "probes m"],
    val_labels: Float[Array, "probes m 1"],
    keys: Key[Array, " probes"],
    *,
    recipe: Recipe,
) -> Probe:
    def one(rows: Array, labels: Array, val_rows: Array, val_labels: Array, key: Array):
        score = partial(_accuracy, x, val_rows, val_labels)
        weight = jnp.ones(1)
        return _train(x, rows, labels, weight, key, recipe=recipe, score=score).best

    return jax.vmap(one)(rows, labels, val_rows, val_labels, keys)


@partial(jax.jit, static_argnames=("recipe",))
def _fit_last(
    x: Float[Array, "rows d"],
    labels: Float[Array, "rows outputs"],
    weight: Float[Array, " outputs"],
    key: Key[Array, ""],
    *,
    recipe: Recipe,
) -> Probe:
    rows = jnp.arange(len(labels))
    return _train(x, rows, labels, weight, key, recipe=recipe, score=_no_score).probe


def _no_score(probe: Probe) -> Float[Array, ""]:
    del probe
    return jnp.float32(0.0)


def _accuracy(x: Array, rows: Array, labels: Array, probe: Probe) -> Array:
    logits = product(x[rows], probe.w) + probe.b[None, :]
    return jnp.mean((logits > 0) == (labels > 0.5))


def _train(
    x: Float[Array, "rows d"],
    rows: Int[Array, " n"],
    labels: Float[Array, "n outputs"],
    weight: Float[Array, " outputs"],
    key: Key[Array, ""],
    *,
    recipe: Recipe,
    score: Any,
) -> _State:
    """Epochs until the patience or the number of epochs ends."""
    optimizer = adam(recipe)
    start, epochs = jax.random.split(key)
    probe = _init(start, x.shape[1], labels.shape[1])
    state = _State(
        jnp.int32(0), probe, optimizer.init(probe), probe, jnp.float32(-1), jnp.int32(0)
    )

    def epoch(state: _State) -> _State:
        order = jax.random.permutation(
            jax.random.fold_in(epochs, state.epoch), len(rows)
        )
        rate = _rate(recipe, state.epoch)

        def step(carry, batch):
            probe, moments = carry
            at, use = batch
            grads = jax.grad(_loss)(
                probe, x[rows[at]], labels[at], use, weight, recipe.l1
            )
            updates, moments = optimizer.update(grads, moments, probe)
            move = jax.tree.map(lambda p, u: p + rate * u, probe, updates)
            return (move, moments), None

        (probe, moments), _ = jax.lax.scan(
            step, (state.probe, state.optimizer), _batches(order, recipe.batch_size)
        )
        now = score(probe)
        better = now > state.accuracy
        best = jax.tree.map(lambda a, b: jnp.where(better, a, b), probe, state.best)
        return _State(
            state.epoch + 1,
            probe,
            moments,
            best,
            jnp.where(better, now, state.accuracy),
            jnp.where(better, 0, state.waited + 1),
        )

    def unfinished(state: _State) -> Array:
        return (state.epoch < recipe.epochs) & (state.waited < recipe.patience)

    return jax.lax.while_loop(unfinished, epoch, state)


def _batches(order: Int[Array, " n"], size: int) -> tuple[Array, Array]:
    """The order in batches `[steps, size]`, and which places of the last are filled."""
    steps = -(-len(order) // size)
    padding = (0, steps * size - len(order))
    use = jnp.pad(jnp.ones(len(order)), padding)
    return jnp.pad(order, padding).reshape(steps, size), use.reshape(steps, size)


def _loss(
    probe: Probe, x: Array, labels: Array, use: Array, weight: Array, l1: float
) -> Array:
    """Mean binary cross-entropy with logits over rows and outputs, and the L1."""
    logits = product(x, probe.w) + probe.b[None, :]
    positive = weight[None, :] * labels * jax.nn.softplus(-logits)
    negative = (1 - labels) * jax.nn.softplus(logits)
    entropy = jnp.mean(positive + negative, axis=1)
    penalty = jnp.mean(jnp.sum(jnp.abs(probe.w), axis=0))
    return jnp.sum(use * entropy) / jnp.sum(use) + l1 * penalty


def adam(recipe: Recipe) -> optax.GradientTransformation:
    """Torch's AdamW or Adam without the learning rate, which `_rate` gives."""
    decay = optax.add_decayed_weights(recipe.weight_decay)
    parts = [optax.scale_by_adam(), decay, optax.scale(-1.0)]
    if recipe.coupled:
        parts = [decay, optax.scale_by_adam(), optax.scale(-1.0)]
    return optax.chain(*parts)


def _rate(recipe: Recipe, epoch: Int[Array, ""]) -> Array | float:
    if recipe.end_lr is None:
        return recipe.lr
    factor = (recipe.end_lr / recipe.lr) ** (1 / recipe.epochs)
    return recipe.lr * factor ** epoch.astype(jnp.float32)


def _init(key: Key[Array, ""], d: int, outputs: int) -> Probe:
    """Uniform within 1 / sqrt(d), as torch starts a linear unit."""
    w_key, b_key = jax.random.split(key)
    bound = d**-0.5
    return Probe(
        jax.random.uniform(w_key, (d, outputs), minval=-bound, maxval=bound),
        jax.random.uniform(b_key, (outputs,), minval=-bound, maxval=bound),
    )
