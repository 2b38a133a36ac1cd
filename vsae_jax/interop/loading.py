"""`vsae_jax.load`: a run, another library's files, or either from the hub."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vsae_jax import interop, runs
from vsae_jax.config import RUNTIME_FIELDS, SAEConfig, TrainConfig
from vsae_jax.config.fields import from_json
from vsae_jax.interop import check, hub, run_folder, sidecar
from vsae_jax.interop.canonical import Autoencoder
from vsae_jax.runs import Run
from vsae_jax.system.errors import UserError

_ROWS = 64


@dataclass(frozen=True, eq=False)
class Loaded:
    """A trained autoencoder, ready to use on raw activations.

    config: shapes, selection rule and k.
    variables: `params` and `norm`, as `sae.encode` takes them.
    data: the language model, layer and text it was trained on, as far as known.
    layer_norm: each row is normalised first (OpenAI); `decode` then needs the rows.
    notes: what a reader has to know besides.
    """

    config: SAEConfig
    variables: dict[str, dict[str, Array]]
    data: dict[str, Any]
    layer_norm: bool
    notes: tuple[str, ...]

    @property
    def params(self) -> dict[str, Array]:
        """w_enc [d_model, d_sae], b_enc, w_dec [d_sae, d_model], b_dec, ..."""
        return self.variables["params"]

    def encode(self, x: Float[Array, "rows d_model"]) -> Float[Array, "rows d_sae"]:
        """Latents of raw activations, at the mean."""
        return check.encode(
            self.variables, x, config=self.config, layer_norm=self.layer_norm
        )

    def decode(
        self,
        f: Float[Array, "rows d_sae"],
        *,
        rows: Float[Array, "rows d_model"] | None = None,
    ) -> Float[Array, "rows d_model"]:
        """Raw activations from latents; `rows`: what was encoded, for a LayerNorm."""
        if self.layer_norm and rows is None:
            raise UserError(
                "this autoencoder normalises each row: decode(f, rows=x) needs x"
            )
        rows = jnp.zeros((len(f), self.config.d_model)) if rows is None else rows
        return check.decode(
            self.variables, f, rows, config=self.config, layer_norm=self.layer_norm
        )

    def __call__(self, x: Float[Array, "rows d_model"]) -> Float[Array, "rows d_model"]:
        """x_hat of raw activations."""
        return self.decode(self.encode(x), rows=x)


def load(path_or_hub_id: str | Path, *, revision: str | None = None) -> Loaded:
    """The autoencoder of a run folder or of SAELens', dictionary_learning's, sparsify's
    or OpenAI's files, in float32: a local folder, or `owner/name[/folder]` on the hub
    at `revision`. Nothing that the files say is run."""
    ae = interop.read(hub.local(path_or_hub_id, revision=revision))
    check.sane(ae, check.generated_rows(ae, count=_ROWS))
    return Loaded(
        config=dataclasses.replace(ae.config, dtype="float32"),
        variables=jax.tree.map(jnp.asarray, ae.variables),
        data=ae.data,
        layer_norm=ae.layer_norm,
        notes=ae.notes,
    )


def open_any(folder: Path) -> Run:
    """A run, or an autoencoder of any format in the shape of one: its `train` is None
    where it was not trained here, and its `data` is what is known."""
    found = [f for f in interop.FORMATS.values() if f.weights(folder)]
    if len(found) != 1 or found[0] is run_folder and not _imported(folder):
        return runs.open_run(folder)
    ae = interop.read(folder)
    where = str(folder / sidecar.NOTE)
    train = ae.train
    if train is not None:
        train = from_json(TrainConfig, train, where=where, may_lack=RUNTIME_FIELDS)
    check.sane(ae, check.generated_rows(ae, count=_ROWS))
    return Run(
        folder=folder,
        train=train,
        sae=ae.config,
        data=_data(ae),
        variables=jax.tree.map(jnp.asarray, ae.variables),
    )


def _imported(folder: Path) -> bool:
    """Whether a folder of ours holds what was not trained here, or as it is."""
    stored = runs.read_json(folder / runs.CONFIG)
    imported = stored.get("imported")
    if not isinstance(imported, dict):
        return False
    return "train" not in stored or imported.get("layer_norm") is True


def _data(ae: Autoencoder) -> dict[str, Any]:
    """Its data with every name that a run's has; None is unknown."""
    unknown = {name: None for name in runs.DATA}
    return unknown | ae.data | {"layer_norm": ae.layer_norm}
