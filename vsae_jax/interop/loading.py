"""`vsae_jax.load`: opens a run or another library's files, here or from the hub."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp

from vsae_jax import interop, runs
from vsae_jax.config import RUNTIME_FIELDS, TrainConfig
from vsae_jax.config.fields import from_json
from vsae_jax.interop import check, hub, run_folder, sidecar
from vsae_jax.interop.canonical import Autoencoder
from vsae_jax.runs import TrainedSAE

_ROWS = 64


def load(path_or_hub_id: str | Path, *, revision: str | None = None) -> TrainedSAE:
    """The autoencoder, in float32, of a run folder or of the files of SAELens,
    dictionary_learning, sparsify, OpenAI or Gemma Scope: in a local folder, under a hub
    id (`owner/name[/folder]`) at `revision`, or under one of SAELens' names
    (`release/id`). No code in the files is run."""
    found = hub.find(path_or_hub_id, revision=revision)
    interop.recognised(found.folder)
    opened = open_any(found.folder)
    source, data = opened.source | found.source, found.data | opened.data
    return dataclasses.replace(opened, source=source, data=data).in_float32()


def read(name: str | Path, *, revision: str | None = None) -> tuple[Path, Autoencoder]:
    """The folder that a name leads to, and its autoencoder, with what only the name
    tells of it."""
    found = hub.find(name, revision=revision)
    ae = interop.read(found.folder)
    source, data = ae.source | found.source, found.data | ae.data
    return found.folder, dataclasses.replace(ae, source=source, data=data)


def open_any(folder: Path) -> TrainedSAE:
    """A run, or an autoencoder of any format, whose `train` is None where it was not
    trained here."""
    found = [f for f in interop.READ.values() if f.weights(folder)]
    if len(found) != 1 or found[0] is run_folder:
        return runs.open_run(folder)
    ae, train = interop.read(folder), None
    if ae.train is not None:
        where = str(folder / sidecar.NOTE)
        train = from_json(TrainConfig, ae.train, where=where, may_lack=RUNTIME_FIELDS)
    # Finite numbers, and no more latents than k.
    check.sane(ae, check.generated_rows(ae, count=_ROWS))
    return TrainedSAE(
        folder=folder,
        sae=ae.config,
        variables=jax.tree.map(jnp.asarray, ae.variables),
        data=ae.data,
        train=train,
        layer_norm=ae.layer_norm,
        latent_scale=ae.latent_scale,
        notes=ae.notes,
        source=ae.source,
    )
