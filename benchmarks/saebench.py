"""Does SAEBench 0.6 give our exported SAE the core numbers that `evaluate` gives it?

    python -m benchmarks.saebench --runs=RUN,RUN --model=FOLDER --activations=DIR \
        --out=NEW_DIR --saebench=PYTHON [--to=saelens --contexts=256]

PYTHON has torch==2.13.0 and sae-bench==0.6.0 (numpy below 2, so no current JAX). Both
evaluate the same held-out contexts: ours the exported folder, theirs what SAELens and
SAEBench's own loader of dictionary_learning make of it, through their `run_evals`.
The model is GPT-NeoX, or what else TransformerLens knows by its architecture, in
float32. Expected: 1e-5 relative; `mse` and `l1` are defined otherwise there.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

BATCH, LONGEST = 16, 512
NAMES = {"explained_variance": "explained_variance_saebench"}


def main() -> None:
    """Exports, evaluates on both sides and prints the table."""
    flags = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for name in ("runs", "model", "activations", "out", "saebench"):
        flags.add_argument(f"--{name}", required=True)
    flags.add_argument("--to", default=",".join(LOADERS))
    flags.add_argument("--contexts", type=int, default=256)
    a = flags.parse_args()
    cases = [(Path(run), to) for run in a.runs.split(",") for to in a.to.split(",")]
    for run, to in cases:
        folder = Path(a.out) / f"{run.name} {to}"
        ours(run, folder, a, to=to)
        command = [a.saebench, __file__, "there", folder, a.model]
        subprocess.run(command, check=True)
        compare(folder)


def ours(run: Path, folder: Path, a: argparse.Namespace, *, to: str) -> None:
    """The export, and our core metrics with the tokens they are of."""
    from vsae_jax import convert, evaluate, runs
    from vsae_jax.activations.shards import Activations
    from vsae_jax.config import ConvertConfig, EvalConfig

    sae = str(folder / "sae")
    flags = {"input": str(run), "out": sae, "activations": a.activations}
    convert.run(ConvertConfig(**flags, to=to))
    stored, rows = Activations.open(a.activations), runs.open_run(run)
    start = rows.data["held_out_contexts"][0]
    np.save(folder / "tokens.npy", stored.tokens(start, start + a.contexts))
    length = stored.manifest.context_length
    config = EvalConfig(
        run=sae,
        model=a.model,
        activations=a.activations,
        num_tokens=a.contexts * length,
        batch_size=BATCH,
        lm_dtype="float32",
    )
    metrics = evaluate.run(config)["sae"]
    (folder / "ours.json").write_text(json.dumps(metrics))


def compare(folder: Path) -> None:
    """One line a metric of theirs."""
    mine = json.loads((folder / "ours.json").read_text())
    theirs = json.loads((folder / "theirs.json").read_text())
    print(f"\n{folder.name}, {theirs.pop('versions')}\n")
    print("| metric | ours | SAEBench | relative difference |\n|---|---|---|---|")
    for name, value in theirs.items():
        own = mine.get(NAMES.get(name, name))
        if own is not None:
            share = abs(own - value) / max(abs(value), 1e-30)
            print(f"| {name} | {own:.6g} | {value:.6g} | {share:.1e} |")


def there(folder: Path, model: str) -> None:
    """SAEBench's own core evaluation of `sae/`, on the same tokens."""
    from importlib import metadata

    import torch
    from sae_bench.evals.core.eval_config import CoreEvalConfig
    from sae_bench.evals.core.main import run_evals
    from sae_bench.sae_bench_utils import general_utils

    torch.set_grad_enabled(False)
    tokens = torch.from_numpy(np.load(folder / "tokens.npy").astype(np.int64))
    sae = LOADERS[folder.name.rpartition(" ")[2]](folder / "sae", Path(model).name)
    _, sae, _ = general_utils.load_and_format_sae("ours", sae, "cpu")
    count = len(tokens) // BATCH
    config = CoreEvalConfig(
        model_name=model,
        batch_size_prompts=BATCH,
        n_eval_reconstruction_batches=count,
        n_eval_sparsity_variance_batches=count,
        exclude_special_tokens_from_reconstruction=True,
        compute_kl=True,
        compute_ce_loss=True,
        compute_l2_norms=True,
        compute_sparsity_metrics=True,
        compute_variance_metrics=True,
        compute_featurewise_density_statistics=True,
    )
    store = Store(tokens)
    # SAEBench itself makes the model with these.
    options = sae.cfg.model_from_pretrained_kwargs or {}
    language_model, special = hooked(model, **options)
    metrics, features = run_evals(
        sae, store, language_model, config, ignore_tokens=special
    )
    flat = {n: v for group in metrics.values() for n, v in group.items()}
    flat["frac_alive"] = float(np.mean(np.array(features["feature_density"]) > 0))
    names = ("sae-bench", "sae-lens", "transformer-lens", "torch", "numpy")
    flat["versions"] = ", ".join(f"{n} {metadata.version(n)}" for n in names)
    (folder / "theirs.json").write_text(json.dumps(flat))


def by_saelens(folder: Path, model: str) -> Any:
    """SAELens' own loader."""
    from sae_lens import SAE

    return SAE.load_from_disk(folder)


def by_saebench(folder: Path, model: str) -> Any:
    """SAEBench's loader of dictionary_learning's TopK, whose hub is this folder."""
    import torch
    from sae_bench.custom_saes import topk_sae

    topk_sae.hf_hub_download = lambda repo_id, filename, **_: str(folder / filename)
    return topk_sae.load_dictionary_learning_topk_sae(
        "me/sae", "ae.pt", model, torch.device("cpu"), torch.float32
    )


LOADERS = {"saelens": by_saelens, "dictionary_learning": by_saebench}


class Store(SimpleNamespace):
    """What `run_evals` needs of an ActivationsStore: the batches, from the start again
    for the second set of metrics."""

    def __init__(self, tokens: Any):
        super().__init__(tokens=tokens, at=0, context_size=tokens.shape[1])

    def get_batch_tokens(self, size: int) -> Any:
        batch = self.tokens[self.at : self.at + size]
        self.at += size
        return batch

    def reset_input_dataset(self) -> None:
        self.at = 0


def hooked(
    folder: str, *, center_writing_weights: bool = False
) -> tuple[Any, set[int]]:
    """A local model as TransformerLens' unprocessed HookedTransformer, by its own table
    of architectures; `from_pretrained` takes only names that it knows."""
    import torch
    from transformer_lens import HookedTransformer
    from transformer_lens import loading_from_pretrained as loading
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    # Masks of a long context would take gigabytes.
    n_ctx = min(model.config.max_position_embeddings, LONGEST)
    config = loading.get_pretrained_model_config(
        folder, n_ctx=n_ctx, default_prepend_bos=False, device="cpu"
    )
    hooked_model = HookedTransformer(config)
    hooked_model.load_and_process_state_dict(
        loading.get_pretrained_state_dict(folder, config, model),
        fold_ln=False,
        center_writing_weights=center_writing_weights,
        center_unembed=False,
        fold_value_biases=False,
    )
    ids = torch.arange(32)[None]
    difference = (hooked_model(ids) - model(ids).logits).abs().max()
    if difference > 1e-3:
        raise SystemExit(f"TransformerLens' logits differ by {difference}")
    c = model.config
    return hooked_model, {i for i in (c.bos_token_id, c.eos_token_id) if i is not None}


if __name__ == "__main__":
    if sys.argv[1] == "there":
        there(Path(sys.argv[2]), sys.argv[3])
    else:
        main()
