"""`python -m vsae_jax.features --run=RUN`: what each latent fires on and writes.

Makes one pass over held-out activation rows (without the language model), then passes
the decoder through the language model's unembedding. Writes
`RUN/features/features.npz`:

    n_tokens []                 tokens counted: those with a row that are not special
    n_fired [d_sae]             tokens on which the latent is not 0
    firing_rate [d_sae]         n_fired / n_tokens
    mean_activation [d_sae]     over all tokens, zeros included
    mean_when_active, std_when_active [d_sae]   over the tokens on which it fires
    max_activation [d_sae]      the f of largest |f|, with its sign; 0: never fires
    decoder_norm [d_sae]        in units of x for one unit of f
    histogram [d_sae, 128]      firings by value; bin b starts at (b - 64) * width
    histogram_width [d_sae]     a power of two; 0: never fires
    top_context, top_position [d_sae, top]      the largest |f| of each of the contexts
                                with the largest, in the activations folder; -1: none
    top_ids [d_sae, top, 2 * window + 1]        token ids around it; -1: outside
    top_values [d_sae, top, 2 * window + 1]     f there; NaN: no row, or special
    top_loss_effect [d_sae, 5, 2 * window + 1]  with --loss_effect; see loss_effect.py
    quantile_context, quantile_position [d_sae, groups, 5], quantile_ids and
    quantile_values             examples of equal shares of the firings, strongest first
    quantile_edges [d_sae, groups + 1]          |f| between the groups, from the sample
    quantile_sampled [d_sae]    firings in that sample: min(100, n_fired)
    correlated_latents, correlation [d_sae, 10] largest Pearson correlations; -1: none
    correlation_tokens []       tokens that they are measured on
    neighbour_latents, neighbour_cosine [d_sae, 10]  of the decoder's rows
    top_logit_tokens, top_logits, bottom_logit_tokens, bottom_logits [d_sae, 10]
    logit_histogram [d_sae, 50], logit_range [d_sae, 2]   see logit_effects.py
    prompt_ids [prompts, context_length], prompt_latents, prompt_values
                                [prompts, rows, 8]: the strongest latents of each token

f is in the units of the autoencoder's latents, which are those of the scaled input. The
sample is uniform without replacement, drawn by a hash of --seed, token and latent. A
group's edges have a standard error of up to 5 % of the firings, and none where n_fired
is 100 or less. `features.json` holds the config, the source of the tokens, and the text
of every token id in the arrays; `features/neuronpedia/` holds the same under
SAEDashboard's names.

Memory: for each latent (100 + top) windows of 4 (2 window + 5) bytes (14 KB by
default); at most 0.4 GB for the correlations; a few batches of latents (16 MB each); a
float32 copy of the parameters; and 4 bytes for each token's id.
"""

import hashlib
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from vsae_jax import lm, runs
from vsae_jax.config import FeaturesConfig, cli
from vsae_jax.config.fields import to_json
from vsae_jax.interop import provenance
from vsae_jax.latents import neuronpedia
from vsae_jax.latents.feature_files import ARRAYS, FOLDER, INFO
from vsae_jax.latents.feature_tables import (
    Source,
    of_decoder,
    open_source,
    pass_over,
    place_windows,
)
from vsae_jax.latents.firings import Limits
from vsae_jax.latents.logit_effects import logit_effects
from vsae_jax.latents.loss_effect import loss_effects
from vsae_jax.lm.token_text import token_texts
from vsae_jax.runs import TrainedSAE
from vsae_jax.system.files import TEMPORARY, naming

_IDS = ("top_ids", "quantile_ids", "top_logit_tokens", "bottom_logit_tokens")


def command(configs: Sequence[FeaturesConfig]) -> None:
    """Writes `features/` for what `--run` names."""
    run(configs[0])


def run(c: FeaturesConfig) -> list[Path]:
    """Writes `features/` into every run folder; returns the folders `features/`."""
    lm.leave_room(backend=c.backend, device=c.device)
    folders = runs.run_folders(c.run)
    load = cache(lm.load_language_model)
    sources = [open_source(folder, c, load) for folder in folders]
    return [write(source, c) for source in sources]


def write(source: Source, c: FeaturesConfig) -> Path:
    """Writes one run's `features/`; returns that folder."""
    folder = source.run.folder / FOLDER
    print(
        f"{source.run.folder}: {source.run.sae.d_sae:,} latents on contexts "
        f"{source.start} to {source.stop - 1} of {source.activations.folder} "
        f"({source.where})"
    )
    limits = Limits(top=c.top, reach=c.window, seed=c.seed)
    arrays = pass_over(source, limits=limits, groups=c.quantiles)
    arrays = place_windows(arrays, source, reach=c.window)
    arrays |= of_decoder(source.run.variables)
    arrays |= logit_effects(
        source.lm, np.asarray(source.run.variables["params"]["w_dec"])
    )
    if c.loss_effect:
        arrays["top_loss_effect"] = loss_effects(source, arrays, reach=c.window)
    info = describe(source, c, arrays)
    folder.mkdir(exist_ok=True)
    write_npz(folder / ARRAYS, arrays)
    # Written last: without it the folder counts as missing.
    runs.write_json(folder / INFO, info)
    if c.neuronpedia:
        neuronpedia.write(folder / "neuronpedia", arrays, info)
    alive = int((arrays["n_fired"] > 0).sum())
    print(f"wrote {folder}: {alive:,} of {source.run.sae.d_sae:,} latents fire")
    return folder


def describe(source: Source, c: FeaturesConfig, arrays: dict) -> dict[str, Any]:
    """The content of `features.json`."""
    m = source.activations.manifest
    ids = np.concatenate([arrays[n].ravel() for n in (*_IDS, "prompt_ids")])
    tokenizer = lm.load_tokenizer(source.lm.files)
    texts = token_texts(tokenizer, np.unique(ids[ids >= 0]).tolist())
    return {
        "config": to_json(c),
        "parameters": parameters_hash(source.run),
        "autoencoder": to_json(source.run.sae),
        "model": source.lm.name,
        "model_name": c.model_name or provenance.public(source.lm.name),
        "lm_dtype": source.lm.dtype,
        "layer": source.run.reader.layer,
        "hook_name": m.hook_name,
        "dataset": m.dataset,
        "activations": str(source.activations.folder),
        "contexts": [source.start, source.stop],
        "contexts_from": source.where,
        "context_length": m.context_length,
        "dropped_positions": m.dropped_positions,
        "n_tokens": int(arrays["n_tokens"]),
        "n_alive": int((arrays["n_fired"] > 0).sum()),
        "special_tokens": "excluded",
        "tokens": {str(i): text for i, text in texts.items()},
    }


def parameters_hash(run: TrainedSAE) -> str:
    """sha256 over the parameters, in the order of their names."""
    digest = hashlib.sha256()
    flat = {**run.variables["params"], **run.variables["norm"]}
    for name in sorted(flat):
        digest.update(name.encode() + np.asarray(flat[name], np.float32).tobytes())
    return digest.hexdigest()


def write_npz(path: Path, arrays: dict[str, Any]) -> None:
    """Writes the arrays compressed, the file whole or not at all."""
    temporary = path.with_name(path.name + TEMPORARY)
    with naming(temporary), temporary.open("wb") as file:
        np.savez_compressed(file, **arrays)
    temporary.replace(path)


if __name__ == "__main__":
    cli.main(command, FeaturesConfig)
