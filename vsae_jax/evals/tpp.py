"""Targeted probe perturbation: does ablating a class's latents hurt only its probe?

intended(c)   = clean accuracy of c's probe - its accuracy after ablation for c
unintended(c) = the mean of that over the other classes' probes
total         = intended - unintended                        (docs/saebench.md 4)
"""

from typing import NamedTuple

import numpy as np

from vsae_jax.evals import ablation, probes
from vsae_jax.evals.encoding import Latents
from vsae_jax.evals.tasks import Fitted, Metrics, Task, fit_probes

SETS_WEIGH_EQUALLY = True


class Prepared(NamedTuple):
    """Probes on the language model's pooled vectors, and their clean accuracies."""

    fitted: Fitted
    clean: dict[str, float]


def prepare(task: Task) -> Prepared:
    """What all autoencoders share."""
    train = task.samples("train", "tpp probe")
    test = task.samples("test", "tpp probe")
    x = task.pooled.x
    fitted = fit_probes(task, x, train, test, probes.SHORTCUT, "tpp")
    clean = {
        name: probes.accuracy(fitted.logits(name, x[s.rows]), s)
        for name, s in task.samples("test", "tpp clean").items()
    }
    return Prepared(fitted, clean)


def score(task: Task, prepared: Prepared, latents: Latents) -> dict[str, Metrics]:
    """Scores by class: total, intended and unintended for each number of latents."""
    chosen = _chosen(task, prepared, latents)
    return {
        name: _of_class(
            task, prepared, latents, name, {n: of[name] for n, of in chosen.items()}
        )
        for name in prepared.clean
    }


def _chosen(
    task: Task, prepared: Prepared, latents: Latents
) -> dict[int, dict[str, np.ndarray]]:
    """The latents to ablate, by how many and by class. A number is left out where the
    choice for a class is not known."""
    known: dict[int, dict[str, np.ndarray]] = {}
    samples = task.samples("train", "tpp effects")
    effects = {
        name: ablation.effects(
            latents, samples[name], prepared.fitted.weights(name)[0], positive_only=True
        )
        for name in prepared.clean
    }
    for n in ablation.usable(latents.pooled.shape[1]):
        of_classes = {
            name: ablation.strongest(e, n, surplus=task.quirks.surplus_latents)
            for name, e in effects.items()
        }
        known[n] = {name: c for name, c in of_classes.items() if c is not None}
        if len(known[n]) < len(effects):
            del known[n]
            print(
                f"note: {task.name}: TPP with n = {n} is left out: fewer latents have "
                "a positive effect, and only torch can tell which others SAEBench "
                "would take; install torch, or leave out the quirk surplus_latents"
            )
    return known


def _of_class(
    task: Task,
    prepared: Prepared,
    latents: Latents,
    ablated: str,
    chosen: dict[int, np.ndarray],
) -> Metrics:
    metrics: Metrics = {"tpp_clean_accuracy": prepared.clean[ablated]}
    for n, some in chosen.items():
        lost = {
            name: prepared.clean[name]
            - ablation.accuracy_after(
                task, prepared.fitted, name, sample, latents, some
            )
            for name, sample in task.samples("test", f"tpp {ablated} {n}").items()
        }
        intended = lost.pop(ablated)
        unintended = sum(lost.values()) / len(lost)
        key = f"tpp_threshold_{n}"
        metrics[f"{key}_total_metric"] = intended - unintended
        metrics[f"{key}_intended_diff_only"] = intended
        metrics[f"{key}_unintended_diff_only"] = unintended
    return metrics
