"""`python -m vsae_jax.evaluate --run=RUN`: numbers that compare autoencoders.

A run or a whole grid; one table, one row an arm; `evals/<name>.json` in every run
folder. The language model and the held-out contexts come from the run's config.
"""

import itertools
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np

from vsae_jax import cli, lm, runs, text
from vsae_jax.config import EvalConfig
from vsae_jax.errors import UserError
from vsae_jax.evals import Subject, core
from vsae_jax.runs import Run
from vsae_jax.shards import Activations

EVALS: dict[str, Callable[[Subject], dict[str, Any]]] = {"core": core.run}
COLUMNS = {
    "ce_loss_score": "loss recovered",
    "kl_div_score": "KL score",
    "explained_variance": "expl. var.",
    "cossim": "cosine",
    "l0": "L0",
    "frac_alive": "alive",
    "entropy_effective_latents": "effective",
}


def command(configs: Sequence[EvalConfig]) -> None:
    """Evaluates what `--run` names and prints the table."""
    run(configs[0])


def run(eval_config: EvalConfig) -> dict[str, dict[str, Any]]:
    """Writes `evals/<name>.json` for every arm; returns core's metrics by arm."""
    names = eval_config.evals.split(",")
    for name in names:
        if name not in EVALS:
            known = ", ".join(EVALS)
            raise UserError(f"--evals={name} is not known; there is {known}")
    load = cache(lm.load_language_model)
    results = {}
    for folder in runs.run_folders(eval_config.run):
        subject = _subject(runs.open_run(folder), eval_config, load)
        for name in names:
            print(f"{folder}: {name} on {subject.config['n_tokens']} tokens")
            result = EVALS[name](subject)
            (folder / runs.EVALS).mkdir(exist_ok=True)
            runs.write_json(folder / runs.EVALS / f"{name}.json", result)
            results[folder.name] = result["metrics"]
    print(table(results))
    return results


def table(results: dict[str, dict[str, Any]]) -> str:
    """One row per arm under short names of the main metrics."""
    rows = [["", *COLUMNS.values()]]
    for name, metrics in results.items():
        rows.append([name, *(_cell(metrics.get(column)) for column in COLUMNS)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])])
        for row in rows
    ]
    return "\n".join(lines)


def _cell(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.4f}" if abs(value) < 10 else f"{value:.1f}"


def _subject(run: Run, c: EvalConfig, load: Callable[..., Any]) -> Subject:
    """A run with its language model and its tokens, checked against each other."""
    model = c.model or run.data["model"]
    revision = c.revision or ("" if c.model else run.data["revision"])
    language_model = load(model, revision=revision or None, backend=c.backend)
    if language_model.d_model != run.sae.d_model:
        raise UserError(
            f"--model={model} has d_model={language_model.d_model} but {run.folder} "
            f"was trained on {run.sae.d_model}; name the model it was trained on"
        )
    tokens = _tokens(run, c, language_model)
    return Subject(
        run=run,
        lm=language_model,
        tokens=tokens,
        batch_size=min(c.batch_size, len(tokens)),
        config={
            "n_tokens": int(tokens.size),
            "n_contexts": len(tokens),
            "tokens_from": c.text or "held-out contexts",
            "model": model,
            "layer": run.data["layer"],
            "bos": run.data["bos"],
            "dropped_positions": run.data["dropped_positions"],
            "center_residual": run.data["center_residual"],
            "special_tokens": "excluded",
            "dtype": "float32",
            "preset": run.train.preset,
            "variant": run.train.variant,
            "seed": run.train.seed,
            "k": run.train.k,
            "beta": run.train.beta,
            "input_scale": run.train.input_scale,
        },
    )


def _tokens(run: Run, c: EvalConfig, language_model: lm.LanguageModel) -> np.ndarray:
    """At most `--num_tokens` of held-out contexts, or of `--text`."""
    length = run.data["context_length"]
    count = max(c.num_tokens // length, 1)
    if c.text:
        tokenizer = lm.load_tokenizer(c.model or run.data["model"])
        documents = text.documents(c.text, split="train", text_column=c.text_column)
        contexts = text.contexts(
            documents,
            tokenizer,
            context_length=length,
            bos_id=language_model.bos_id,
            bos=run.data["bos"],
        )
        return np.stack(list(itertools.islice(contexts, count)))
    activations = Activations.open(c.activations or run.train.activations)
    if activations.manifest.hash == run.data["manifest"]:
        start, stop = run.data["held_out_contexts"]
    elif c.activations:
        start, stop = 0, activations.n_contexts
    else:
        raise UserError(
            f"{run.train.activations} is not what {run.folder} was trained on; name "
            "activations to evaluate on with --activations"
        )
    _check_vocabulary(activations, language_model)
    return activations.tokens(start, min(stop, start + count))


def _check_vocabulary(activations: Activations, model: lm.LanguageModel) -> None:
    if activations.manifest.tokenizer_hash != model.tokenizer_hash:
        raise UserError(
            f"the tokens in {activations.folder} were made with another tokenizer than "
            f"that of --model={model.name}; name the model they were extracted from"
        )


if __name__ == "__main__":
    cli.main(command, EvalConfig)
