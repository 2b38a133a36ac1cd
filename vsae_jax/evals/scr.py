"""Spurious correlation removal: a probe was trained on two concepts at once. Does
ablating the latents of one concept leave it with the other?

For a pair of labels P, N and two attributes +, - there are three tasks: the attribute
(+ against -), the label (P against N), and the biased one, P+ against N-.

    dir1: the attribute's latents are ablated, the biased probe is scored on the label
    dir2: the label's latents, on the attribute
    score = (after - before) / (clean - before)               (docs/saebench.md 5)

before: the biased probe without ablation. clean: the task's own probe. The metric is
the score of the direction in which the biased probe is worse before ablation.
"""

from typing import NamedTuple

import numpy as np

from vsae_jax.evals import ablation, probes, sampling
from vsae_jax.evals.encoding import Latents
from vsae_jax.evals.sampling import Sample, Split
from vsae_jax.evals.tasks import Fitted, Metrics, Task, fit_probes, mean

# Positive and negative quadrants of each task.
TASKS = {
    "attribute": (("P+", "N+"), ("P-", "N-")),
    "label": (("P+", "P-"), ("N+", "N-")),
    "biased": (("P+",), ("N-",)),
}
# What is ablated, and what the biased probe is scored on.
DIRECTIONS = {1: ("attribute", "label"), 2: ("label", "attribute")}
_LEAST_GAP = 0.001
# The mean is over all pairs, whichever set they are from.
SETS_WEIGH_EQUALLY = False


class Prepared(NamedTuple):
    """The three probes, and the accuracies of each task's own probe (clean) and of the
    biased one (before), by pair."""

    fitted: dict[str, Fitted]
    clean: dict[str, dict[str, float]]
    before: dict[str, dict[str, float]]


def prepare(task: Task) -> Prepared:
    """What all autoencoders share, by pair of labels."""
    prepared = Prepared({}, {}, {})
    for pair, split in task.quadrants.items():
        train = samples(task, pair, split, "train", "scr probe")
        test = samples(task, pair, split, "test", "scr probe")
        x = task.pooled.x
        fitted = fit_probes(task, x, train, test, probes.SHORTCUT, "scr", pair)
        tests = samples(task, pair, split, "test", "scr clean")
        prepared.fitted[pair] = fitted
        prepared.clean[pair] = accuracies(task, fitted, tests, None)
        prepared.before[pair] = accuracies(task, fitted, tests, "biased")
    return prepared


def score(task: Task, prepared: Prepared, latents: Latents) -> dict[str, Metrics]:
    """Scores by pair of labels: both directions and the metric for each number of
    latents."""
    return {
        pair: _of_pair(task, prepared, latents, pair, split)
        for pair, split in task.quadrants.items()
    }


def samples(
    task: Task, pair: str, split: Split, part: str, call: str
) -> dict[str, Sample]:
    """The three tasks' balanced samples of the split's part `train` or `test`."""
    rows = getattr(split, part)
    q = len(rows["P-"])
    found = {}
    for name, sides in TASKS.items():
        # The balanced tasks take q of a quadrant, the biased one 2 q.
        size = q if name != "biased" else 2 * q
        positive, negative = (
            np.concatenate([rows[quadrant][:size] for quadrant in side])
            for side in sides
        )
        rng = task.rng(pair, part, name, call=call)
        found[name] = sampling.against(positive, negative, rng)
    return found


def accuracies(
    task: Task, fitted: Fitted, tests: dict[str, Sample], probe: str | None
) -> dict[str, float]:
    """Accuracies on each task's test sample, of its own probe or of `probe`."""
    return {
        name: probes.accuracy(fitted.logits(probe or name, task.pooled.x[s.rows]), s)
        for name, s in tests.items()
    }


def _of_pair(
    task: Task, prepared: Prepared, latents: Latents, pair: str, split: Split
) -> Metrics:
    before, clean = prepared.before[pair], prepared.clean[pair]
    fitted = prepared.fitted[pair]
    effects = {
        name: _effects(task, fitted, latents, pair, split, name) for name in before
    }
    metrics: Metrics = {f"scr_clean_{name}_accuracy": clean[name] for name in clean}
    for name in ("label", "attribute"):
        metrics[f"scr_biased_on_{name}_accuracy"] = before[name]
    for n in ablation.usable(latents.pooled.shape[1]):
        scores: dict[int, float | None] = {}
        tests = samples(task, pair, split, "test", f"scr {n}")
        for direction, (ablated, on) in DIRECTIONS.items():
            # No effect is negative, so there is no surplus.
            chosen = ablation.strongest(effects[ablated], n, surplus=False)
            assert chosen is not None
            after = ablation.accuracy_after(
                task, fitted, "biased", tests[on], latents, chosen
            )
            gap = clean[on] - before[on]
            change = after - before[on]
            scores[direction] = change / gap if gap >= _LEAST_GAP else 0.0
            metrics[f"scr_dir{direction}_threshold_{n}"] = scores[direction]
        combined = combine(before, scores, tie_counts=not task.quirks.ties_missing)
        if combined is not None:
            metrics[f"scr_metric_threshold_{n}"] = combined
    return metrics


def _effects(
    task: Task, fitted: Fitted, latents: Latents, pair: str, split: Split, name: str
) -> np.ndarray:
    w, _ = fitted.weights(name)
    sample = samples(task, pair, split, "train", "scr effects")[name]
    return np.abs(ablation.effects(latents, sample, w, positive_only=False))


def combine(
    before: dict[str, float], scores: dict[int, float | None], *, tie_counts: bool
) -> float | None:
    """The score of the direction whose task the biased probe is worse at. Where it is
    equally good at both, their mean, or None if ties do not count."""
    if before["label"] == before["attribute"]:
        return mean(list(scores.values())) if tie_counts else None
    return scores[1 if before["label"] < before["attribute"] else 2]
