"""vsae_jax itself: `config.json` and `sae.safetensors`, of a run or of an import.

An import has no `train` in its config.json; the rest is a run's.
"""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from vsae_jax import runs
from vsae_jax.autoencoder import sae
from vsae_jax.config import SAEConfig
from vsae_jax.config.fields import from_json
from vsae_jax.interop.canonical import Autoencoder
from vsae_jax.interop.tensors import (
    as_float32,
    check_layout,
    read_json,
    read_safetensors,
)
from vsae_jax.system.errors import UserError

NAME = "vsae_jax"
SAYS: dict[str, str] = {}
CONFIG, WEIGHTS = runs.CONFIG, runs.PARAMETERS


def weights(folder: Path) -> Path | None:
    """The file of the weights, if this is such a folder."""
    both = (folder / CONFIG).is_file() and (folder / WEIGHTS).is_file()
    return folder / WEIGHTS if both else None


def read(folder: Path) -> Autoencoder:
    """The autoencoder of a finished run, or of what `write` wrote."""
    where, path = folder / CONFIG, folder / WEIGHTS
    stored = read_json(where)
    config = from_json(SAEConfig, stored.get("sae", {}), where=str(where))
    train, data = stored.get("train"), stored.get("data")
    if not isinstance(data, dict) or not isinstance(train, dict | None):
        raise UserError(f"{where} has no data, or its train is no object")
    arrays = read_safetensors(path)
    check_layout(arrays, sae.shapes(config), where=path)
    arrays = as_float32(arrays, where=path)
    scale, mean = arrays.pop("scale"), arrays.pop("mean")
    if scale <= 0:
        raise UserError(f"{path}: scale is {scale}, expected above 0")
    imported = stored.get("imported")
    imported = imported if isinstance(imported, dict) else {}
    name = folder.resolve().name
    source: dict[str, Any] = {"format": NAME, "name": name, "dtype": "float32"}
    origin = imported.get("source")
    if isinstance(origin, dict) and origin.get("format") != NAME:
        source["origin"] = origin
    notes, times = imported.get("notes", []), imported.get("latent_scale", 1.0)
    if not isinstance(notes, list) or type(times) is not float or not times > 0:
        raise UserError(f"{where}: notes or latent_scale of imported is not ours")
    return Autoencoder(
        config=config,
        params=arrays,
        scale=np.float32(scale),
        mean=mean,
        layer_norm=imported.get("layer_norm") is True,
        latent_scale=times,
        data=data,
        train=train,
        source=source | _step(train),
        notes=tuple(line for line in notes if isinstance(line, str)),
    )


def _step(train: dict[str, Any] | None) -> dict[str, Any]:
    return {"step": train["steps"]} if train and "steps" in train else {}


def rewritten(ae: Autoencoder) -> Autoencoder:
    """Nothing has to be rewritten."""
    return ae


def write(ae: Autoencoder, folder: Path) -> Path:
    """The two files; returns that of the weights."""
    value: dict[str, Any] = {} if ae.train is None else {"train": ae.train}
    value |= {"sae": dataclasses.asdict(ae.config), "data": ae.data}
    value["imported"] = {
        "source": ae.source,
        "notes": list(ae.notes),
        "layer_norm": ae.layer_norm,
        "latent_scale": ae.latent_scale,
    }
    value["versions"] = runs.versions()
    runs.write_parameters(folder / WEIGHTS, ae.variables)
    runs.write_json(folder / CONFIG, value)
    return folder / WEIGHTS
