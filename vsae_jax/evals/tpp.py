"""Targeted probe perturbation: does ablating a class's latents hurt only its probe?

intended(c)   = clean accuracy of c's probe - the same after ablation for c
unintended(c) = the mean of that over the other classes' probes
total         = intended - unintended                        (docs/saebench.md 4)
"""

from typing import NamedTuple

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
    """By class: total, intended and unintended for each number of latents."""
    return {name: _of_class(task, prepared, latents, name) for name in prepared.clean}


def _of_class(
    task: Task, prepared: Prepared, latents: Latents, ablated: str
) -> Metrics:
    w, _ = prepared.fitted.weights(ablated)
    sample = task.samples("train", "tpp effects")[ablated]
    effects = ablation.effects(latents, sample, w, positive_only=True)
    chosen = ablation.ranked(effects, surplus=task.quirks.surplus_latents)
    metrics: Metrics = {"tpp_clean_accuracy": prepared.clean[ablated]}
    for n in ablation.usable(len(effects)):
        lost = {
            name: prepared.clean[name]
            - ablation.accuracy_after(
                task, prepared.fitted, name, sample, latents, chosen[:n]
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
