"""A trained autoencoder with all that is known of it."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Array, Float

from vsae_jax.autoencoder.reader import Reader
from vsae_jax.config import Hook, SAEConfig, TrainConfig, read_hook


@dataclass(frozen=True, eq=False, repr=False)
class TrainedSAE:
    """A trained autoencoder, ready to use on raw activations.

    folder: where its files are.
    sae: shapes, selection rule and k.
    variables: `params` and `norm`, as `sae.encode` takes them.
    data: what it was trained on, as far as known: the activations' manifest, language
      model, layer, text, held-out contexts.
    train: None for what was not trained here.
    layer_norm: each row is normalised first (OpenAI); `decode` then needs the rows.
    notes: what a reader has to know besides.
    """

    folder: Path
    sae: SAEConfig
    variables: dict[str, dict[str, Array]]
    data: dict[str, Any]
    train: TrainConfig | None = None
    layer_norm: bool = False
    notes: tuple[str, ...] = ()

    @cached_property
    def reader(self) -> Reader:
        """How it reads a language model."""
        return Reader(
            self.variables,
            self.sae,
            hook=hook_of(self.data),
            center=bool(self.data.get("center_residual")),
            layer_norm=self.layer_norm,
            has_bos=self.data.get("bos") != "none",
            dropped_positions=self.data.get("dropped_positions") or 0,
        )

    @property
    def config(self) -> SAEConfig:
        """Shapes, selection rule and k."""
        return self.sae

    @property
    def params(self) -> dict[str, Array]:
        """w_enc [d_model, d_sae], b_enc, w_dec [d_sae, d_model], b_dec, ..., in units
        of the scaled input; `reader.directions` are the decoder's rows in those of x.
        """
        return self.variables["params"]

    def encode(
        self, x: Float[Array | np.ndarray, "... d_model"]
    ) -> Float[Array, "... d_sae"]:
        """Latents of raw activations, at the mean."""
        return self.reader.encode(x)

    def decode(
        self,
        f: Float[Array | np.ndarray, "... d_sae"],
        *,
        rows: Float[Array | np.ndarray, "... d_model"] | None = None,
    ) -> Float[Array, "... d_model"]:
        """Raw activations from latents; `rows`: what was encoded, for a LayerNorm."""
        return self.reader.decode(f, rows=rows)

    def __call__(
        self, x: Float[Array | np.ndarray, "... d_model"]
    ) -> Float[Array, "... d_model"]:
        """x_hat of raw activations."""
        return self.decode(self.encode(x), rows=x)

    def __repr__(self) -> str:
        model = self.data.get("model")
        of = f" of {model}" if model else ""
        return f"<TrainedSAE {self.folder}: {self.reader}{of}>"


def hook_of(data: dict[str, Any]) -> Hook | None:
    """Where in a language model a run's `data` says that its rows are from; of a layer
    alone, the stream after it. None for a hook that is not known here."""
    name, layer = data.get("hook_name"), data.get("layer")
    if name is None:
        return None if layer is None else Hook(layer)
    return read_hook(name)
