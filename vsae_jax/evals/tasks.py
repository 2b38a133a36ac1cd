"""What an evaluation on labelled texts takes: the rows of a set, split and encoded."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float, Key

from vsae_jax.evals import sampling
from vsae_jax.evals.encoding import Pooled
from vsae_jax.evals.probes import Probe, Recipe, fit
from vsae_jax.evals.quirks import Quirks
from vsae_jax.evals.sampling import Sample, Split

Metrics = dict[str, float | None]
# The rows that SAEBench trains a probe on, and that its numbers of epochs suit.
_USUAL_ROWS = 4000


class Task(NamedTuple):
    """A labelled set as rows of `pooled`.

    split: rows by class. quadrants: rows by (label, attribute), for each pair of
    labels, named `P / N`.
    """

    name: str
    split: Split
    quadrants: Mapping[str, Split]
    pooled: Pooled
    seed: int
    quirks: Quirks

    def rng(self, *names: object, call: object = "") -> np.random.Generator:
        """The generator for what is named. With the quirk `resample` each call of
        SAEBench's has another one."""
        last = (call,) if self.quirks.resample else ()
        return sampling.generator(self.seed, self.name, *names, *last)

    def key(self, *names: object) -> Key[Array, ""]:
        """The key for what is named."""
        return jax.random.key(int(self.rng(*names).integers(2**31)))

    def samples(self, part: str, call: object) -> dict[str, Sample]:
        """One-vs-rest of every class, from the split's part `train` or `test`."""
        rows = getattr(self.split, part)
        return {
            name: sampling.one_vs_rest(rows, name, self.rng(part, name, call=call))
            for name in rows
        }


class Fitted(NamedTuple):
    """Probes by the names of their tasks, with the samples they were trained on."""

    probes: Probe
    train: dict[str, Sample]

    def weights(self, name: str) -> tuple[Float[np.ndarray, " d"], float]:
        """w and b of one probe."""
        i = list(self.train).index(name)
        return np.asarray(self.probes.w[i]), float(self.probes.b[i])

    def logits(self, name: str, x: Float[np.ndarray, "rows d"]) -> np.ndarray:
        """w x + b of each row."""
        w, b = self.weights(name)
        return x @ w + b


def fit_probes(
    task: Task,
    x: Float[np.ndarray, "rows d"],
    train: dict[str, Sample],
    test: dict[str, Sample],
    recipe: Recipe,
    *names: Any,
) -> Fitted:
    """A probe per sample; `names` say what it is for and decide the random numbers."""
    if task.quirks.validate_on_test:
        parts = [(train[name], test[name]) for name in train]
    else:
        parts = [sampling.validation(train[name]) for name in train]
    fitted, validation = (list(part) for part in zip(*parts, strict=True))
    if not task.quirks.fixed_epochs:
        recipe = recipe.with_steps_of(_USUAL_ROWS, n=len(fitted[0].rows))
    probes = fit(x, fitted, validation, recipe=recipe, key=task.key("probe", *names))
    return Fitted(probes, train)


def mean(values: list[float | None]) -> float | None:
    """The mean of the known values; None if there are none."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def mean_metrics(each: list[Metrics]) -> Metrics:
    """The mean of each metric over classes or sets that have it."""
    names = dict.fromkeys(name for metrics in each for name in metrics)
    return {name: mean([m[name] for m in each if name in m]) for name in names}
