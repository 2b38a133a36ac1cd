"""vsae_jax itself: `config.json` and `sae.safetensors`, of a run or of an import.

An import has no `train` in its config.json; the rest is a run's.
"""

from pathlib import Path
from typing import Any

import numpy as np

from vsae_jax import runs
from vsae_jax.config.fields import to_json
from vsae_jax.interop.canonical import Autoencoder
from vsae_jax.interop.tensors import file_beside

NAME = "vsae_jax"
SAYS: dict[str, str] = {}
CONFIG, WEIGHTS = runs.CONFIG, runs.PARAMETERS


weights = file_beside(CONFIG, WEIGHTS)


def read(folder: Path) -> Autoencoder:
    """The autoencoder of a finished run, or of what `write` wrote."""
    run = runs.open_run(folder)
    arrays = run.variables["params"] | run.variables["norm"]
    params = {name: np.asarray(array) for name, array in arrays.items()}
    scale, mean = params.pop("scale"), params.pop("mean")
    name = folder.resolve().name
    source: dict[str, Any] = {"format": NAME, "name": name, "dtype": "float32"}
    if run.source.get("format") not in (None, NAME):
        source["origin"] = run.source
    return Autoencoder(
        config=run.sae,
        params=params,
        scale=np.float32(scale),
        mean=mean,
        layer_norm=run.layer_norm,
        latent_scale=run.latent_scale,
        data=run.data,
        train=to_json(run.train) if run.train else None,
        source=source | ({"step": run.train.steps} if run.train else {}),
        notes=run.notes,
    )


def rewritten(ae: Autoencoder) -> Autoencoder:
    """Nothing has to be rewritten."""
    return ae


def write(ae: Autoencoder, folder: Path) -> Path:
    """The two files; returns that of the weights."""
    runs.write_autoencoder(
        folder,
        ae.config,
        ae.variables,
        data=ae.data,
        train=ae.train,
        source=ae.source,
        notes=list(ae.notes),
        layer_norm=ae.layer_norm,
        latent_scale=ae.latent_scale,
    )
    return folder / WEIGHTS
