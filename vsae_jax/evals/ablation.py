"""What a probe says about a text when latents are ablated (docs/saebench.md 4 and 5).

Ablating latents changes a token's x by -f[chosen] @ directions[chosen], and the pooled
vector by the mean of that. So each text is encoded only once.
"""

import importlib.util

import numpy as np
from jaxtyping import Float, Int

from vsae_jax.evals import probes
from vsae_jax.evals.encoding import CONTEXT, Latents, Pooled
from vsae_jax.evals.sampling import Sample
from vsae_jax.evals.tasks import Fitted, Task

NS = (2, 5, 10, 20, 50, 100, 500)


def effects(
    latents: Latents,
    sample: Sample,
    w: Float[np.ndarray, " d_model"],
    *,
    positive_only: bool,
) -> Float[np.ndarray, " d_sae"]:
    """Each latent's (mean over positives - mean over negatives) times (w . direction);
    with `positive_only` 0 where the difference is negative (TPP)."""
    f, yes = latents.pooled[sample.rows], sample.labels > 0.5
    difference = f[yes].mean(axis=0) - f[~yes].mean(axis=0)
    if positive_only:
        difference = np.maximum(difference, 0)
    return difference * (latents.directions @ w)


def strongest(
    effects: Float[np.ndarray, " d_sae"], n: int, *, surplus: bool
) -> Int[np.ndarray, " chosen"] | None:
    """The n latents with the largest effects, but only those with effects above 0.

    With `surplus`, as in SAEBench, up to as many as have an effect at all. Where fewer
    effects are above 0, some latents with an effect of 0 are then among them. Only
    torch's topk tells which; None where it is needed but torch is not installed.
    """
    order = np.argsort(-effects, kind="stable")
    above = int(np.sum(effects > 0))
    most = min(n, int(np.sum(effects != 0)) if surplus else above)
    if not above < most < np.sum(effects >= 0):
        return order[:most]
    if importlib.util.find_spec("torch") is None:
        return None
    import torch

    return torch.topk(torch.from_numpy(effects.astype(np.float32)), most)[1].numpy()


def ablated_pooled(
    latents: Latents,
    pooled: Pooled,
    rows: Int[np.ndarray, " rows"],
    chosen: Int[np.ndarray, " chosen"],
    *,
    padding_leak: bool,
) -> Float[np.ndarray, "rows d_model"]:
    """The language model's pooled vectors without the chosen latents. With the leak,
    the latents' values at x = 0 are subtracted, too, once for each of the context's
    other positions."""
    f = latents.pooled[np.ix_(rows, chosen)]
    if padding_leak:
        n = pooled.n_valid[rows]
        share = ((CONTEXT - n) / np.maximum(n, 1)).astype(np.float32)
        f = f + share[:, None] * latents.at_zero[chosen][None, :]
    return pooled.x[rows] - f @ latents.directions[chosen]


def accuracy_after(
    task: Task,
    fitted: Fitted,
    name: str,
    sample: Sample,
    latents: Latents,
    chosen: Int[np.ndarray, " chosen"],
) -> float:
    """The accuracy of the probe `name` on a sample with the chosen latents ablated."""
    x = ablated_pooled(
        latents,
        task.pooled,
        sample.rows,
        chosen,
        padding_leak=task.quirks.padding_leak,
    )
    return probes.accuracy(fitted.logits(name, x), sample)


def usable(d_sae: int) -> list[int]:
    """The numbers of latents to ablate, up to those that an autoencoder has."""
    return [n for n in NS if n <= d_sae]
