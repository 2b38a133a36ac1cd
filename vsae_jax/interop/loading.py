"""`vsae_jax.load`: a run, another library's files, or either from the hub."""

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
    """The autoencoder of a run folder or of SAELens', dictionary_learning's, sparsify's
    or OpenAI's files or Gemma Scope's, in float32: a local folder, a hub id
    (`owner/name[/folder]`) at `revision`, or one of SAELens' names (`release/id`).
    Nothing that the files say is run."""
    folder, ae = read(path_or_hub_id, revision=revision)
    trained = _trained(folder, ae)
    return dataclasses.replace(
        trained, sae=dataclasses.replace(ae.config, dtype="float32")
    )


def read(name: str | Path, *, revision: str | None = None) -> tuple[Path, Autoencoder]:
    """The folder that a name leads to, and its autoencoder, with what is known of it
    by the name alone."""
    found = hub.find(name, revision=revision)
    ae = interop.read(found.folder)
    source, data = ae.source | found.source, found.data | ae.data
    return found.folder, dataclasses.replace(ae, source=source, data=data)


def open_any(folder: Path) -> TrainedSAE:
    """A run, or an autoencoder of any format, whose `train` is None where it was not
    trained here."""
    found = [f for f in interop.READ.values() if f.weights(folder)]
    if len(found) != 1 or found[0] is run_folder and not _imported(folder):
        return runs.open_run(folder)
    ae = interop.read(folder)
    where, train = str(folder / sidecar.NOTE), ae.train
    if train is not None:
        train = from_json(TrainConfig, train, where=where, may_lack=RUNTIME_FIELDS)
    return dataclasses.replace(_trained(folder, ae), train=train)


def _trained(folder: Path, ae: Autoencoder) -> TrainedSAE:
    """What was read, once it gave finite numbers and no more latents than k."""
    check.sane(ae, check.generated_rows(ae, count=_ROWS))
    return TrainedSAE(
        folder=folder,
        sae=ae.config,
        variables=jax.tree.map(jnp.asarray, ae.variables),
        data=ae.data,
        layer_norm=ae.layer_norm,
        notes=ae.notes,
    )


def _imported(folder: Path) -> bool:
    """Whether a folder of ours holds what was not trained here, or as it is."""
    stored = runs.read_json(folder / runs.CONFIG)
    imported = stored.get("imported")
    if not isinstance(imported, dict):
        return False
    return "train" not in stored or imported.get("layer_norm") is True
