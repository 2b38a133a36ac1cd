"""The tables of `features.npz` (described in vsae_jax.features), from one pass over
held-out activation rows and from the decoder's rows."""

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from vsae_jax import lm
from vsae_jax.activations.shards import Activations
from vsae_jax.activations.shuffle import read_ahead
from vsae_jax.autoencoder.reader import Reader, jit_encode
from vsae_jax.autoencoder.sae import Variables
from vsae_jax.config import OpenOptions
from vsae_jax.interop.loading import open_any
from vsae_jax.latents.firings import FeaturePass, Limits
from vsae_jax.latents.logit_effects import largest
from vsae_jax.latents.map_statistics import unit_rows
from vsae_jax.runs import TrainedSAE, opening
from vsae_jax.system import progress
from vsae_jax.system.errors import UserError

NEIGHBOURS = 10
# Values of latents in a batch: 16 MB in float32.
_BATCH_LATENTS = 2**22


class Source(NamedTuple):
    """A run, its language model and the held-out contexts start, ..., stop - 1, with a
    description of those."""

    run: TrainedSAE
    lm: lm.LanguageModel
    activations: Activations
    start: int
    stop: int
    where: str


def open_source(
    folder: Path,
    settings: OpenOptions,
    load: Callable[..., Any] = lm.load_language_model,
) -> Source:
    """A run with what the pass reads; refuses what does not belong together."""
    opened = opening.filled(open_any(folder), settings)
    static = dataclasses.replace(opened.sae, dtype="float32")
    opened = dataclasses.replace(opened, sae=static)
    activations = opening.open_activations(opened, settings)
    m = activations.manifest
    for name, mine in (
        ("d_model", opened.sae.d_model),
        ("layer", opened.reader.layer),
        ("site", opened.reader.place.site),
        ("center_residual", opened.reader.center),
    ):
        if getattr(m, name) != mine:
            raise UserError(
                f"{activations.folder} has {name}={getattr(m, name)} but {folder} was "
                f"trained on {name}={mine}; name its activations with --activations"
            )
    model = opening.load_model(opened, settings, load)
    opening.check_tokenizer(activations, model)
    start, stop, where = opening.held_out(opened, activations)
    stop = min(stop, start + max(settings.num_tokens // m.context_length, 1))
    return Source(opened, model, activations, start, stop, where)


def pass_over(source: Source, *, limits: Limits, groups: int) -> dict[str, Any]:
    """The tables of FeaturePass over the source's rows."""
    config, rows = source.run.sae, source.activations.rows_per_context
    at_once = max(_BATCH_LATENTS // (config.d_sae * rows), 1)
    streamed = FeaturePass(config.d_sae, limits=limits)
    encode = partial(encode_counted, source.run.reader)
    waiting: list[tuple[Array, np.ndarray]] = []

    def take() -> None:
        f, counts = waiting.pop(0)
        streamed.add(np.asarray(f)[: counts.size].reshape(*counts.shape, -1), counts)
        bar.update(len(counts))

    with progress.bar(source.stop - source.start, unit="contexts") as bar:
        for x, counts in read_ahead(_batches(source, at_once)):
            # The device makes the next batch while the host looks at this one.
            waiting.append((encode(x, _filled_to(counts.ravel(), len(x))), counts))
            if len(waiting) > 1:
                take()
        while waiting:
            take()
    return streamed.finish(groups=groups)


@jit_encode
def encode_counted(
    reader: Reader,
    x: Float[Array | np.ndarray, "rows d_model"],
    counts: Bool[Array | np.ndarray, " rows"],
) -> Float[Array, "rows d_sae"]:
    """f of raw activation rows at the mean; 0 on rows that do not count."""
    return jnp.where(counts[:, None], reader.encode(x), 0)


def _batches(source: Source, at_once: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Rows, filled up to one shape with zeros, and which of the contexts' rows count,
    `[contexts, rows]`."""
    m, rows = source.activations.manifest, source.activations.rows_per_context
    for start in range(source.start, source.stop, at_once):
        stop = min(start + at_once, source.stop)
        tokens = source.activations.tokens(start, stop)[:, m.dropped_positions :]
        x = source.activations.rows(start * rows, stop * rows)
        yield _filled_to(x, at_once * rows), ~np.isin(tokens, m.special_ids)


def _filled_to(array: np.ndarray, length: int) -> np.ndarray:
    """The array with zeros at its end, up to `length`."""
    filled = np.zeros((length, *array.shape[1:]), array.dtype)
    filled[: len(array)] = array
    return filled


def place_windows(
    arrays: dict[str, Any], source: Source, *, reach: int
) -> dict[str, Any]:
    """The arrays with the pass's token numbers replaced by contexts, positions and the
    ids around them."""
    m, rows = source.activations.manifest, source.activations.rows_per_context
    tokens = source.activations.tokens(source.start, source.stop)
    arrays = dict(arrays)
    for name in ("top", "quantile"):
        token = arrays.pop(f"{name}_token")
        context, row = np.divmod(token.clip(0), rows)
        position = row + m.dropped_positions
        near = position[..., None] + np.arange(-reach, reach + 1)
        inside = (near >= 0) & (near < m.context_length) & (token >= 0)[..., None]
        ids = tokens[context[..., None], near.clip(0, m.context_length - 1)]
        arrays[f"{name}_ids"] = np.where(inside, ids, -1).astype(np.int32)
        where = token >= 0
        context = np.where(where, context + source.start, -1).astype(np.int64)
        arrays[f"{name}_context"] = context
        arrays[f"{name}_position"] = np.where(where, position, -1).astype(np.int32)
    arrays["prompt_ids"] = tokens[: len(arrays["prompt_latents"])]
    return arrays


def of_decoder(variables: Variables) -> dict[str, np.ndarray]:
    """The decoder rows' norms in units of x, and each row's nearest ones by cosine."""
    w_dec = np.asarray(variables["params"]["w_dec"], np.float32)
    unit = unit_rows(w_dec)
    count = min(NEIGHBOURS, len(unit) - 1)
    latents = np.full((len(unit), NEIGHBOURS), -1, np.int32)
    cosines = np.zeros((len(unit), NEIGHBOURS), np.float32)
    for start in range(0, len(unit) if count else 0, 256):
        cosine = unit[start : start + 256] @ unit.T
        own = np.arange(len(cosine))
        cosine[own, start + own] = -np.inf
        best = largest(cosine, count)
        latents[start : start + 256, :count] = best
        cosines[start : start + 256, :count] = np.take_along_axis(cosine, best, 1)
    scale = float(np.asarray(variables["norm"]["scale"]))
    return {
        "decoder_norm": np.linalg.norm(w_dec, axis=1) / scale,
        "neighbour_latents": latents,
        "neighbour_cosine": cosines,
    }
