"""vSAE without TopK: is the KL term enough to make latents sparse?

Claim (Baker and Li 4): "the KL divergence was not a strong enough regularizer to cause
sparseness", which is why the paper pairs it with TopK; it shows no number.

Command:

    python -m experiments.reproduce --scale=standin --only=without_topk --out=DIR

Expected: L0 near d_sae for all beta, since mu is not cut at 0. Ours:
docs/results.md.
"""

from typing import Any

from experiments import ablation
from experiments.report import Section
from experiments.study import Arms, Study
from vsae_jax.config import TrainConfig
from vsae_jax.runs import series

GRID = "without_topk"
_BETAS = (0.01, 0.1, 1.0, 10.0)
_RELU_SHARE = (0.2, 1.0, 5.0)
_MEASURES = {
    "l0": "L0",
    "explained_variance": "expl. var.",
    "ce_loss_score": "loss recovered",
    "alive": "alive",
    "entropy_effective_latents": "effective",
}


def grids(study: Study) -> dict[str, Arms]:
    """The vSAE over beta, with and without relu(mu), beside the ReLU SAE over L1."""
    c, shared = study.scale.controlled, ablation.common(study)
    l1 = shared.pop("l1")
    kinds: dict[str, dict[str, Any]] = {}
    for beta in _BETAS:
        vsae = {"variant": "vsae", "beta": beta}
        kinds[f"vsae_beta-{beta:g}"] = vsae
        kinds[f"vsae_relu_beta-{beta:g}"] = vsae | {"relu": True}
    for share in _RELU_SHARE:
        kinds[f"relu_l1-{share * l1:g}"] = {"variant": "relu", "l1": share * l1}
    lr = sorted(c.lrs)[len(c.lrs) // 2]
    arms = {
        f"{kind}_seed-{seed}": TrainConfig(**shared, **fields, lr=lr, seed=seed)
        for kind, fields in kinds.items()
        for seed in range(c.map_seeds)
    }
    return {GRID: arms}


def run(study: Study) -> Section:
    """L0 and what is left of the signal."""
    study.rows("paper", study.layer)
    study.train(GRID, grids(study)[GRID])
    study.evaluate(GRID, "core")
    rows = [["arm", "seeds", *_MEASURES.values()]]
    for kind, seeds in study.metrics(GRID).items():
        values = (list(ablation.pick(seeds, m).values()) for m in _MEASURES)
        cells = [series.spread(v) for v in values]
        rows.append([kind, str(len(seeds)), *cells])
    return Section(
        parts=[
            f"d_sae {study.scale.controlled.d_sae}; L0 counts latents that are not 0, "
            "of the mean (evaluation does not sample). Mean ± standard deviation.",
            rows,
        ],
        title="vSAE without TopK",
        claim="the KL term was not a strong enough regularizer to cause sparseness",
        paper="no number",
    )
