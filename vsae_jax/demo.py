"""`python -m vsae_jax.demo --out=DIR`: all steps, offline, on a small model.

The bundled GPT-NeoX (1.3 M parameters) reads its own stories. A TopK SAE, the paper's
vSAE and the vSAE of the paper's released code are trained on the same activations and
evaluated with the language model in the loop.
"""

import dataclasses
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from vsae_jax import evaluate, extract, train
from vsae_jax.config import DemoConfig, EvalConfig, ExtractConfig, TrainConfig, cli

_LAYER = 2
ARM = TrainConfig(d_sae=1024, k=32, batch_size=512)
ARMS: dict[str, dict[str, Any]] = {
    "topk": {"variant": "topk"},
    "vsae_paper": {"variant": "vsae_topk"},
    "vsae_released": {"variant": "vsae_topk", "preset": "released"},
}


def command(configs: Sequence[DemoConfig]) -> None:
    """Runs the demo and prints what it found."""
    run(configs[0])


def run(config: DemoConfig) -> dict[str, dict[str, Any]]:
    """The metrics by arm. If started again, it does not repeat finished parts."""
    out = Path(config.out)
    with resources.as_file(resources.files("vsae_jax") / "data/neox-stories") as model:
        extract.run(_extraction(config, model))
        results = {}
        for name, settings in ARMS.items():
            print(f"\n{name}")
            arm = dataclasses.replace(
                ARM,
                activations=str(out / "activations"),
                out=str(out / name),
                steps=config.steps,
                **settings,
            )
            folder = train.run(arm)
            results |= evaluate.run(EvalConfig(run=str(folder)))
    print(f"\n{evaluate.table(results)}\n\n{verdict(results)}\n")
    for name in results:
        print(f"{out / name}: config.json, metrics.jsonl, sae.safetensors, evals/")
    first, second = list(results)[:2]
    print(
        f"\nSee what they fire on: python -m vsae_jax.dashboard --run={out / first} "
        f"--compare={out / second} --out={out / 'both.html'}"
    )
    return results


def verdict(results: dict[str, dict[str, Any]]) -> str:
    """What the table says, in sentences made from its numbers."""
    topk = results["topk"]
    lines = []
    for name, words in (
        ("vsae_paper", "The paper's vSAE (sampled, sigma 1)"),
        ("vsae_released", "The released code's vSAE (never sampled)"),
    ):
        vsae = results[name]
        more = {column: vsae[column] - topk[column] for column in evaluate.COLUMNS}
        lines.append(
            f"{words}: {more['explained_variance']:+.3f} explained variance, "
            f"{more['ce_loss_score']:+.3f} loss recovered and "
            f"{more['entropy_effective_latents']:+.0f} effective latents against TopK; "
            f"{100 * vsae['frac_alive']:.0f} % of its latents are alive "
            f"(TopK {100 * topk['frac_alive']:.0f} %)."
        )
    lines.append("One seed on a small model: a demonstration, not a result.")
    return "\n".join(lines)


def _extraction(config: DemoConfig, model: Path) -> ExtractConfig:
    return ExtractConfig(
        model=str(model),
        backend="jax",
        layer=_LAYER,
        dataset=str(model / "sampled_stories.jsonl"),
        num_tokens=config.num_tokens,
        # The released code's vSAE needs this; all three read the same activations.
        center_residual=True,
        out=str(Path(config.out) / "activations"),
    )


if __name__ == "__main__":
    cli.main(command, DemoConfig)
