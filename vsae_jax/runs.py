"""A run folder: config.json, metrics.jsonl, checkpoints/, sae.safetensors, evals/.

A grid's folder holds one run folder per arm, and grid.json names them.
"""

import json
import os
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from vsae_jax.config import SAEConfig, TrainConfig
from vsae_jax.errors import UserError, one_line
from vsae_jax.fields import difference, from_json

CONFIG, METRICS, PARAMETERS = "config.json", "metrics.jsonl", "sae.safetensors"
CHECKPOINTS, EVALS, GRID, SUMMARY = "checkpoints", "evals", "grid.json", "summary.csv"
_JSON_LIMIT = 2**26


class Run(NamedTuple):
    """A trained autoencoder and all that is known of it.

    `data` says what it was trained on: activations folder, the manifest's hash and
    main fields, held-out contexts.
    """

    folder: Path
    train: TrainConfig
    sae: SAEConfig
    data: dict[str, Any]
    variables: dict[str, dict[str, Array]]


def open_run(folder: str | Path) -> Run:
    """A finished run from its folder."""
    folder = Path(folder)
    if not (folder / CONFIG).is_file():
        raise UserError(f"{folder} is not a run folder: it has no {CONFIG}")
    if not (folder / PARAMETERS).is_file():
        raise UserError(f"the run in {folder} is not finished: train it to the end")
    stored = read_json(folder / CONFIG)
    where = str(folder / CONFIG)
    missing = {"train", "sae", "data"} - stored.keys()
    if missing:
        raise UserError(f"{where} lacks {', '.join(sorted(missing))}")
    sae = from_json(SAEConfig, stored["sae"], where=where)
    return Run(
        folder=folder,
        train=from_json(TrainConfig, stored["train"], where=where),
        sae=sae,
        data=stored["data"],
        variables=read_parameters(folder / PARAMETERS, sae),
    )


def run_folders(folder: str | Path) -> list[Path]:
    """The folder itself, or the arms of a grid in the grid's order."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"--run={folder} is not a folder; name what train wrote")
    if not (folder / GRID).is_file():
        return [folder]
    arms = read_json(folder / GRID).get("arms", [])
    if any(Path(arm["folder"]).name != arm["folder"] for arm in arms):
        raise UserError(f"{folder / GRID} names a folder outside the grid")
    return [folder / arm["folder"] for arm in arms]


def write_parameters(path: Path, variables: Mapping[str, Mapping[str, Array]]) -> None:
    """Writes every array in float32 under its own name, whole or not at all."""
    flat = {**variables["params"], **variables["norm"]}
    arrays = {n: np.array(a, np.float32, order="C") for n, a in flat.items()}
    part = path.with_name(path.name + ".part")
    save_file(arrays, part)
    os.replace(part, path)


def read_parameters(path: Path, config: SAEConfig) -> dict[str, dict[str, Array]]:
    """Variables from `sae.safetensors`; wrong names and shapes are refused."""
    try:
        arrays = load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read: {one_line(error)}") from None
    expected = _shapes(config)
    found = {name: array.shape for name, array in arrays.items()}
    if found != expected:
        wrong = difference(expected, found)
        raise UserError(f"{path} does not match its config: {wrong}")
    norm = {name: jnp.asarray(arrays.pop(name)) for name in ("scale", "mean")}
    return {"params": {n: jnp.asarray(a) for n, a in arrays.items()}, "norm": norm}


def _shapes(config: SAEConfig) -> dict[str, tuple[int, ...]]:
    d, m = config.d_model, config.d_sae
    shapes = {"w_enc": (d, m), "b_enc": (m,), "w_dec": (m, d), "b_dec": (d,)}
    if config.variance == "learned":
        shapes |= {"w_var": (d, m), "b_var": (m,)}
    return shapes | {"scale": (), "mean": (d,)}


def write_json(path: Path, value: Any) -> None:
    """Writes JSON through a temporary name, so that a kill leaves the old file."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n")
    os.replace(part, path)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of at most 64 MiB."""
    try:
        if path.stat().st_size > _JSON_LIMIT:
            raise UserError(f"{path} is over {_JSON_LIMIT} bytes; it is not ours")
        value = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {one_line(error)}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds {type(value).__name__}; expected an object")
    return value


def keep_metrics_up_to(path: Path, step: int) -> None:
    """Drops lines of metrics.jsonl past `step`, and a line cut short by a kill."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text().splitlines(keepends=True):
        if not line.endswith("\n") or json.loads(line)["step"] > step:
            break
        kept.append(line)
    part = path.with_name(path.name + ".part")
    part.write_text("".join(kept))
    os.replace(part, path)


def versions() -> dict[str, str]:
    """Versions of what computes, for the record."""
    names = ("vsae_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
    return {name: metadata.version(name) for name in names}
