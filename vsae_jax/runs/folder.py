"""A run folder: config.json, metrics.jsonl, checkpoints/, sae.safetensors, evals/.

A grid's folder holds one run folder per arm, and grid.json names them.
"""

import json
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from vsae_jax.autoencoder import sae
from vsae_jax.config import SAEConfig
from vsae_jax.config.fields import difference, to_json
from vsae_jax.system.errors import UserError, one_line
from vsae_jax.system.files import TEMPORARY, replace_file
from vsae_jax.system.locks import LOCK
from vsae_jax.system.strict_json import read_object, refuse_constant
from vsae_jax.system.version import VERSION

CONFIG, METRICS, PARAMETERS = "config.json", "metrics.jsonl", "sae.safetensors"
CHECKPOINTS, EVALS, GRID, SUMMARY = "checkpoints", "evals", "grid.json", "summary.csv"
DIVERGED = "diverged.json"
_JSON_LIMIT = 2**26
_LINE_LIMIT = 2**20
# The longest name of a file in bytes, on all common file systems.
_NAME_LIMIT = 255


def holds_other_files(folder: Path) -> bool:
    """Whether there is anything but a lock and files that a kill left half written."""
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    ours = (LOCK, CONFIG + TEMPORARY, GRID + TEMPORARY)
    return any(name not in ours for name in names)


def run_folders(folder: str | Path) -> list[Path]:
    """The folder itself, or a grid's arms in order, without those that diverged."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"--run={folder} is not a folder; name what train wrote")
    if not (folder / GRID).is_file():
        return [folder]
    arms = read_json(folder / GRID).get("arms")
    if not isinstance(arms, list) or not arms:
        raise UserError(f"{folder / GRID} names no arms")
    folders = [folder / _arm_name(arm, folder / GRID) for arm in arms]
    left = [arm for arm in folders if not (arm / DIVERGED).is_file()]
    if not left:
        raise UserError(f"every arm of {folder} diverged: there is nothing to evaluate")
    return left


def _arm_name(arm: Any, grid: Path) -> str:
    name = arm.get("folder") if isinstance(arm, dict) else arm
    if not isinstance(name, str) or name in ("", "..") or Path(name).name != name:
        raise UserError(f"{grid}: {name!r} is not a folder in the grid")
    if len(name.encode(errors="replace")) > _NAME_LIMIT:
        raise UserError(f"{grid}: {name[:40]!r}... is too long for a folder")
    return name


def write_parameters(path: Path, variables: Mapping[str, Mapping[str, Array]]) -> None:
    """Writes every array in float32 under its own name, whole or not at all."""
    flat = {**variables["params"], **variables["norm"]}
    arrays = {n: np.array(a, np.float32, order="C") for n, a in flat.items()}
    # Not save_file, which makes a file that only its owner may read.
    replace_file(path, save(arrays))


def write_autoencoder(
    folder: Path,
    config: SAEConfig,
    variables: Mapping[str, Mapping[str, Array]],
    *,
    data: Mapping[str, Any],
    train: Mapping[str, Any] | None,
    **imported: Any,
) -> None:
    """Writes config.json and sae.safetensors of an autoencoder that was not trained in
    this folder; `imported` is what only such an autoencoder has."""
    value = {} if train is None else {"train": train}
    value |= {"sae": to_json(config), "data": data}
    write_parameters(folder / PARAMETERS, variables)
    write_json(folder / CONFIG, value | {"imported": imported, "versions": versions()})


def read_parameters(path: Path, config: SAEConfig) -> dict[str, dict[str, Array]]:
    """The variables in `sae.safetensors`; refuses wrong names and shapes, NaN and
    infinity."""
    try:
        arrays = load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read: {one_line(error)}") from None
    expected = sae.shapes(config)
    found = {name: array.shape for name, array in arrays.items()}
    if found != expected:
        wrong = difference(expected, found)
        raise UserError(f"{path} does not match its config: {wrong}")
    _check_numbers(path, arrays)
    kinds = {"params": sae.arrays(config), "norm": sae.buffers(config)}
    return {
        kind: {name: jnp.asarray(arrays[name]) for name in names}
        for kind, names in kinds.items()
    }


def _check_numbers(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    way_on = "train the run again, or copy the file again from where it was good"
    for name, array in arrays.items():
        if array.dtype != np.float32:
            raise UserError(
                f"{path}: {name} is of {array.dtype}, not float32; {way_on}"
            )
        bad = array.size - np.count_nonzero(np.isfinite(array))
        if bad:
            raise UserError(
                f"{path}: {bad:,} of {array.size:,} numbers of {name} are NaN or "
                f"infinite; {way_on}"
            )
    if not arrays["scale"] > 0:
        raise UserError(f"{path}: scale is {arrays['scale']}, not above 0; {way_on}")


def write_json(path: Path, value: Any) -> None:
    """Writes JSON through a temporary name, so that a kill leaves the old file."""
    replace_file(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of at most 64 MiB."""
    return read_object(path, limit=_JSON_LIMIT)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl. Damaged ones are left out, and a note counts them; a
    last line without an end, which a kill cut short, is not counted."""
    lines, damaged = [], 0
    with path.open("rb") as file:
        while data := file.readline(_LINE_LIMIT):
            if data.endswith(b"\n") and (line := _metrics_line(data)):
                lines.append(line)
            elif data.endswith(b"\n") or len(data) == _LINE_LIMIT:
                damaged += 1
    if damaged:
        print(f"note: {damaged} lines of {path} are damaged and left out")
    return lines


def read_history(path: Path) -> dict[str, Float[np.ndarray, " intervals"]]:
    """The columns of metrics.jsonl that every line has, `step` first."""
    lines = read_metrics(path)
    names = [n for n in (lines[0] if lines else {}) if all(n in line for line in lines)]
    return {name: np.array([line[name] for line in lines]) for name in names}


def _metrics_line(data: bytes) -> dict[str, Any] | None:
    try:
        line = json.loads(data, parse_constant=refuse_constant)
    except (ValueError, RecursionError):
        return None
    is_metrics = isinstance(line, dict) and type(line.get("step")) is int
    return line if is_metrics else None


def keep_metrics_up_to(path: Path, step: int) -> None:
    """Removes the lines of metrics.jsonl after `step`, and damaged ones."""
    if not path.is_file():
        return
    kept = [line for line in read_metrics(path) if line["step"] <= step]
    replace_file(path, "".join(metrics_line(line) for line in kept).encode())


def metrics_line(line: Mapping[str, Any]) -> str:
    """A line of metrics.jsonl."""
    return json.dumps(line, allow_nan=False) + "\n"


def versions() -> dict[str, str]:
    """The versions of vsae_jax and of what it computes with, for the record."""
    names = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
    found = {name: metadata.version(name) for name in names}
    return {"vsae_jax": VERSION} | found
