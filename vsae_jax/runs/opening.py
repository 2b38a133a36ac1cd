"""Opens a trained autoencoder with its language model and tokens, and checks that they
belong together: what every command that looks at an autoencoder needs."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from vsae_jax import lm
from vsae_jax.activations import text
from vsae_jax.activations.manifest import read_manifest
from vsae_jax.activations.shards import Activations
from vsae_jax.autoencoder.reader import Reader
from vsae_jax.config import OpenOptions
from vsae_jax.lm.weights import weights_hash
from vsae_jax.runs import CONFIG
from vsae_jax.runs.trained import TrainedSAE, hook_of
from vsae_jax.system.errors import UserError

# Fields of a config that only training reads. They are set to these values, so that
# autoencoders that differ in nothing else are evaluated by one compiled program.
_OF_THE_LOSS = {
    "noise": False,
    "noise_at": "latents",
    "penalty": "none",
    "kl_over": "all",
    "auxk": False,
    "k_aux": 1,
    "auxk_units": "loss",
    "kl_units": "loss",
    "l0": False,
    "prefixes": "none",
    "decoder_norm": "unit",
}
# How a language model's weights compare to those that a run was trained on.
THE_SAME, OTHERS, UNKNOWN = "the run's", "others than the run's", "not known"
_TEXTS = (".jsonl", ".txt", ".parquet")
_OF_TRAINING = ("preset", "variant", "seed", "k", "beta", "input_scale")
# The contexts of an autoencoder from elsewhere, where nothing says otherwise.
_OF_CONTEXTS = {
    "context_length": 128,
    "bos": "keep",
    "dropped_positions": 0,
    "center_residual": False,
}


class Subject(NamedTuple):
    """A trained autoencoder, its language model and held-out contexts.

    tokens: `[contexts, context_length]`. config: what is written beside every result.
    """

    run: TrainedSAE
    lm: lm.LanguageModel
    tokens: Int[np.ndarray, "contexts time"]
    batch_size: int
    config: dict[str, Any]

    @property
    def reader(self) -> Reader:
        """How the autoencoder reads the language model."""
        return self.run.reader

    def batches(self) -> Iterator[tuple[np.ndarray, np.ndarray, int]]:
        """Batches: tokens, the mask of those that count, and the number of contexts.
        The last batch is padded with contexts that do not count."""
        special = sorted(self.lm.special_ids)
        for start in range(0, len(self.tokens), self.batch_size):
            tokens = self.tokens[start : start + self.batch_size]
            keep = ~np.isin(tokens, special)
            keep[:, : self.reader.dropped_positions] = False
            padding = ((0, self.batch_size - len(tokens)), (0, 0))
            yield np.pad(tokens, padding), np.pad(keep, padding), len(tokens)


def subject_of(run: TrainedSAE, c: OpenOptions, load: Callable[..., Any]) -> Subject:
    """A run with its language model and its tokens, checked against each other."""
    run = filled(run, c)
    language_model = load_model(run, c, load)
    tokens, tokens_from = _tokens(run, c, language_model)
    # Whatever it was trained in, it is evaluated in float32, as the config says.
    static = dataclasses.replace(run.sae, dtype="float32", **_OF_THE_LOSS)
    run = dataclasses.replace(run, sae=static)
    return Subject(
        run=run,
        lm=language_model,
        tokens=tokens,
        batch_size=min(c.batch_size, len(tokens)),
        config={
            "n_tokens": int(tokens.size),
            "n_contexts": len(tokens),
            "context_length": tokens.shape[1],
            "batch_size": c.batch_size,
            "tokens_from": tokens_from,
            "model": language_model.name,
            "revision": language_model.revision or "",
            "lm_dtype": language_model.dtype,
            "model_weights": weights_of(run, language_model),
            "layer": run.data["layer"],
            "hook_name": run.reader.place.name,
            "bos": run.data["bos"],
            "dropped_positions": run.data["dropped_positions"],
            "center_residual": run.data["center_residual"],
            "special_tokens": "excluded",
            "dtype": run.sae.dtype,
            **{name: getattr(run.train, name, None) for name in _OF_TRAINING},
        },
    )


def load_model(
    run: TrainedSAE, c: OpenOptions, load: Callable[..., Any] = lm.load_language_model
) -> lm.LanguageModel:
    """The language model of a `filled` run, checked against it."""
    model = c.model or run.data.get("model")
    revision = c.revision or ("" if c.model else run.data.get("revision"))
    language_model = load(
        model,
        revision=revision or None,
        backend=c.backend,
        dtype=c.lm_dtype,
        device=c.device,
    )
    if language_model.d_model != run.sae.d_model:
        raise UserError(
            f"--model={model} has d_model={language_model.d_model} but {run.folder} "
            f"was trained on {run.sae.d_model}; name the model it was trained on"
        )
    language_model.check(run.reader.place)
    weights = weights_of(run, language_model)
    if weights == OTHERS and not c.model_differs:
        raise UserError(
            f"the weights of --model={model} are not those of {run.data['model']}, "
            f"which {run.folder} was trained on; name that model, or use this one with "
            "--model_differs"
        )
    if weights == UNKNOWN and run.train is not None:
        print(
            f"note: whether {model} has the weights that {run.folder} was trained on "
            "is not known: there are no hashes of both to compare"
        )
    return language_model


def weights_of(run: TrainedSAE, language_model: lm.LanguageModel) -> str:
    """Whether a language model has the weights of the one that the run was trained on:
    `THE_SAME`, `OTHERS` or `UNKNOWN`. A commit of the hub stands for its weights."""
    then = run.data.get("revision") or _weights_hash(run)
    now = language_model.revision or weights_hash(language_model.files)
    if (
        not then
        or not now
        or bool(run.data.get("revision")) != bool(language_model.revision)
    ):
        return UNKNOWN
    return THE_SAME if then == now else OTHERS


def _weights_hash(run: TrainedSAE) -> str:
    """The hash of the weights that the run was trained on, from its config, or for
    older runs from its activations; "" where neither has it."""
    if run.data.get("weights_hash") or run.train is None:
        return run.data.get("weights_hash") or ""
    manifest = read_manifest(Path(run.train.activations))
    same = manifest is not None and manifest.hash == run.data.get("manifest")
    return manifest.weights_hash if manifest is not None and same else ""


def filled(run: TrainedSAE, c: OpenOptions) -> TrainedSAE:
    """The run with what an autoencoder from elsewhere does not say about itself: its
    layer from `--layer`; its site and how contexts start from `--activations`, or else
    the usual ones."""
    data, unknown = run.data, {}
    layer = data.get("layer")
    if data.get("hook_name") is not None and hook_of(data) is None:
        raise UserError(
            f"{run.folder} reads {data['hook_name']}; only the residual stream after a "
            "block and what its attention or MLP adds to it are known here"
        )
    if c.layer is not None and layer not in (None, c.layer):
        raise UserError(f"--layer={c.layer}, but {run.folder} is of layer {layer}")
    if layer is None and c.layer is None:
        raise UserError(f"{run.folder} does not say its layer; name it with --layer")
    if not c.model and not data.get("model"):
        raise UserError(f"{run.folder} names no language model; name it with --model")
    if any(data.get(name) is None for name in _OF_CONTEXTS):
        unknown = _OF_CONTEXTS
        if c.activations:
            m = Activations.open(Path(c.activations)).manifest
            unknown = {name: getattr(m, name) for name in _OF_CONTEXTS}
            if m.layer == c.layer:
                unknown |= {"hook_name": m.hook_name}
    unknown = unknown | {"layer": c.layer, "revision": ""}
    filled = {n: v for n, v in unknown.items() if data.get(n) is None}
    return dataclasses.replace(run, data=data | filled)


def _tokens(
    run: TrainedSAE, c: OpenOptions, language_model: lm.LanguageModel
) -> tuple[np.ndarray, str]:
    """Contexts `[contexts, time]` of at most `--num_tokens` tokens, held out or from
    what the flags name, and a description of their source."""
    if c.text:
        return _tokens_of_text(run, c, language_model), c.text
    activations = open_activations(run, c)
    check_tokenizer(activations, language_model)
    start, stop, where = held_out(run, activations)
    count = max(c.num_tokens // activations.manifest.context_length, 1)
    return activations.tokens(start, min(stop, start + count)), where


def check_tokenizer(activations: Activations, language_model: lm.LanguageModel) -> None:
    """Refuses activations whose tokens are not the language model's."""
    if activations.manifest.tokenizer_hash != language_model.tokenizer_hash:
        raise UserError(
            f"the tokens in {activations.folder} were made with another tokenizer than "
            f"that of --model={language_model.name}; name the model they were "
            "extracted from"
        )


def held_out(run: TrainedSAE, activations: Activations) -> tuple[int, int, str]:
    """The contexts start, ..., stop - 1 that the run was not trained on (all contexts
    of a folder that is not the run's), and a description of them."""
    m, where = activations.manifest, str(activations.folder)
    if m.hash == run.data.get("manifest"):
        start, stop = run.data["held_out_contexts"]
        if stop > activations.n_contexts:
            raise UserError(
                f"{run.folder} holds out contexts up to {stop} of "
                f"{activations.n_contexts}: its {CONFIG} was edited"
            )
        return start, stop, "held-out contexts"
    if m.dataset == run.data.get("dataset"):
        print(
            f"note: {where} is from the data set that {run.folder} was trained on: "
            "some of its text may have been seen in training"
        )
    return 0, activations.n_contexts, where


def _tokens_of_text(
    run: TrainedSAE, c: OpenOptions, language_model: lm.LanguageModel
) -> np.ndarray:
    path = Path(c.text).expanduser()
    if path.suffix.lower() not in _TEXTS or not path.is_file():
        raise UserError(f"--text={c.text} is not a {', '.join(_TEXTS)} file")
    length = run.data["context_length"]
    contexts = text.contexts(
        text.documents(c.text, split="train", text_column=c.text_column),
        lm.load_tokenizer(language_model.files),
        context_length=length,
        bos_id=language_model.bos_id,
        bos=run.data["bos"],
    )
    count = max(c.num_tokens // length, 1)
    return np.stack(list(itertools.islice(contexts, count)))


def open_activations(run: TrainedSAE, c: OpenOptions) -> Activations:
    """The run's activations, or others whose contexts start in the same way."""
    other = "name activations of its model with --activations"
    if "text" in getattr(c, "__dataclass_fields__", ()):  # it has the flag
        other += ", or text with --text"
    own = run.train.activations if run.train else ""
    if not c.activations and not own:
        raise UserError(f"{run.folder} names no folder of activations; {other}")
    folder = Path(c.activations or own)
    if not c.activations and not folder.is_dir():
        raise UserError(f"{folder}, which {run.folder} names, is not here; {other}")
    activations = Activations.open(folder)
    m = activations.manifest
    if not c.activations and m.hash != run.data.get("manifest"):
        raise UserError(f"{folder} is not what {run.folder} was trained on; {other}")
    if (m.bos == "none") != (run.data["bos"] == "none"):
        raise UserError(
            f"--activations={folder} has bos={m.bos} but {run.folder} was trained with "
            f"bos={run.data['bos']}: only one of them has BOS before every context"
        )
    return activations
