"""Sparse probing: how well k latents tell a class from the rest (docs/saebench.md 3).

Per class, on pooled vectors: a probe on everything, and for k = 1, 2 and 5 a logistic
regression on the k columns whose means over the class and over the others differ most.
"""

import importlib.util

import numpy as np
from jaxtyping import Float, Int

from vsae_jax.evals import probes
from vsae_jax.evals.encoding import Latents
from vsae_jax.evals.sampling import Sample
from vsae_jax.evals.tasks import Metrics, Task, fit_probes
from vsae_jax.system.errors import missing_extra

KS = (1, 2, 5)
SETS_WEIGH_EQUALLY = True


def prepare(task: Task) -> dict[str, Metrics]:
    """The language model's own accuracies by class, which all autoencoders share."""
    return _accuracies(task, task.pooled.x, "llm")


def score(
    task: Task, prepared: dict[str, Metrics], latents: Latents
) -> dict[str, Metrics]:
    """Accuracies by class."""
    own = _accuracies(task, latents.pooled, "sae")
    return {name: own[name] | prepared[name] for name in own}


def top_k(
    x: Float[np.ndarray, "rows d"], labels: Float[np.ndarray, " rows"], k: int
) -> Int[np.ndarray, " k"]:
    """The columns with the largest |mean over positives - mean over negatives|."""
    yes = labels > 0.5
    difference = np.abs(x[yes].mean(axis=0) - x[~yes].mean(axis=0))
    return np.argsort(-difference, kind="stable")[:k]


def top_k_accuracy(
    x: Float[np.ndarray, "rows d"], train: Sample, test: Sample, k: int
) -> float:
    """Test accuracy of scikit-learn's logistic regression on the top k columns."""
    if importlib.util.find_spec("sklearn") is None:
        raise missing_extra("scikit-learn", extra="analysis")
    from sklearn.linear_model import LogisticRegression

    inputs = x[train.rows]
    columns = top_k(inputs, train.labels, k)
    probe = LogisticRegression(max_iter=1000)
    probe.fit(inputs[:, columns], train.labels > 0.5)
    found = probe.predict(x[test.rows][:, columns])
    return float(np.mean(found == (test.labels > 0.5)))


def _accuracies(
    task: Task, x: Float[np.ndarray, "rows d"], prefix: str
) -> dict[str, Metrics]:
    train, test = (task.samples(part, f"{prefix} all") for part in ("train", "test"))
    fitted = fit_probes(task, x, train, test, probes.ALL_LATENTS, "sparse", prefix)
    result: dict[str, Metrics] = {name: {} for name in train}
    for name, metrics in result.items():
        logits = fitted.logits(name, x[test[name].rows])
        metrics[f"{prefix}_test_accuracy"] = probes.accuracy(logits, test[name])
    for k in KS:
        train, test = (
            task.samples(part, f"{prefix} {k}") for part in ("train", "test")
        )
        for name, metrics in result.items():
            value = top_k_accuracy(x, train[name], test[name], k)
            metrics[f"{prefix}_top_{k}_test_accuracy"] = value
    return result
