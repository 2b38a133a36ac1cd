"""`vsae_jax.fit`: training from Python, with the same loop as the command's."""

import contextlib
import dataclasses
import inspect
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from vsae_jax import runs
from vsae_jax.activations.given import GivenRows, given
from vsae_jax.config import PROCESS_FIELDS, Hook, TrainConfig
from vsae_jax.config.fields import from_keywords
from vsae_jax.runs import TrainedSAE
from vsae_jax.system import progress as progress_of
from vsae_jax.system.errors import Interrupted, UserError
from vsae_jax.training.loop import run_arms
from vsae_jax.training.plan import PlannedRun, plan

# Flags that are no keywords of `fit`; only a command can join several processes.
_NOT_OURS = {"activations", "out", *PROCESS_FIELDS}
# Settings that need all rows before the first step.
_NEEDS_ALL = {"bad_rows": "skip", "feed": "device"}

History = dict[str, Float[np.ndarray, " intervals"]]


class Fit(NamedTuple):
    """A trained autoencoder, and its metrics: an array over `step` by name."""

    sae: TrainedSAE
    history: History


def fit(
    rows: Any,
    *,
    out: str | Path | None = None,
    progress: bool = True,
    model: str = "",
    layer: int | None = None,
    **settings: Any,
) -> Fit:
    """Trains a sparse autoencoder, as `python -m vsae_jax.train` does.

    Args:
      rows: raw activations: a NumPy or JAX array or torch tensor `[rows, d_model]`, a
        `.npy` file of one (mapped, not read whole), a folder that `extract` wrote or
        its `Activations`; or batches `[rows, d_model]` of any length, which are taken
        in their order. Rows other than batches are shuffled, and the last 5 % are held
        out (`held_out=`).
      out: a run folder, which every command opens, and where training is resumed; with
        None the result stays in memory.
      progress: whether to print what the command prints.
      model, layer: the language model and block whose residual stream the rows are,
        where that is known; a folder says it itself.
      settings: the command's flags by their names (`python -m vsae_jax.train --help`):
        variant, d_sae, k, steps, batch_size, lr, beta, seed, preset, ... with the same
        defaults. The same rows, settings and machine give the same bits.

    Raises UserError, a ValueError, in one line: before the first step for a setting
    that is unknown or out of range, and for rows that are not finite when they are
    read. A signal raises KeyboardInterrupt, or with `out` Interrupted, once the state
    is saved there.
    """
    for name in settings.keys() & _NOT_OURS:
        raise UserError(f"fit has no keyword {name}; it is a flag of the command only")
    config = from_keywords(TrainConfig, settings, of="fit")
    with contextlib.ExitStack() as stack:
        if not progress:
            stack.enter_context(progress_of.silent())
        if out:
            folder = Path(out)
        else:
            if config.tensorboard:
                raise UserError(
                    "tensorboard=True writes to the run folder; name it by out="
                )
            place = stack.enter_context(tempfile.TemporaryDirectory("_vsae_jax"))
            folder = Path(place) / "run"
            config = dataclasses.replace(config, checkpoint_every=0)
        config = dataclasses.replace(config, out=str(folder))
        try:
            run_arms([_planned(rows, config, model, layer)])
        except Interrupted as stopped:
            if out:
                raise
            raise KeyboardInterrupt("fit was stopped by a signal") from stopped
        trained = runs.open_run(folder).in_float32()
        history = runs.read_history(folder / runs.METRICS)
    if not out:
        trained = dataclasses.replace(trained, folder=Path("unsaved"))
    return Fit(trained, history)


def _planned(
    rows: Any, config: TrainConfig, model: str, layer: int | None
) -> PlannedRun:
    """The run on a folder, as the command plans it, or on rows that are given."""
    activations = given(rows)
    if not isinstance(activations, GivenRows):
        if model or layer is not None:
            raise UserError(f"{activations.folder} says its model and layer itself")
        place = str(activations.folder)
        return plan(dataclasses.replace(config, activations=place))
    if config.stream:
        raise UserError(
            "stream=True goes on with the text of a folder; give the folder's name"
        )
    asked = [n for n, v in _NEEDS_ALL.items() if getattr(config, n) == v]
    asked += [] if config.max_norm_multiple is None else ["max_norm_multiple"]
    if asked and activations.in_order:
        raise UserError(
            f"{asked[0]}={getattr(config, asked[0])!r} needs all rows before the "
            "start, but batches come one by one; give an array"
        )
    known = {} if layer is None else {"layer": layer, "hook_name": Hook(layer).name}
    activations.known = known | ({"model": model} if model else {})
    return plan(config, activations)


def _signature() -> inspect.Signature:
    """The signature of `fit` with the flags of `train` as keywords, for help and
    completion."""
    own = inspect.signature(fit)
    keywords = [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=field.default,
            annotation=field.type,
        )
        for field in dataclasses.fields(TrainConfig)
        if field.name not in _NOT_OURS
    ]
    first = [p for p in own.parameters.values() if p.name != "settings"]
    return own.replace(parameters=[*first, *keywords])


fit.__signature__ = _signature()
