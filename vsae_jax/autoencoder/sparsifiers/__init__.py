"""Sparsifiers: which latents of a row stay. A file each, a row each in `SPARSIFIERS`.

A file is a module with the names of `Sparsifier`; a new one needs its row here, its
flags in `config`, and its variants in `config.presets`.
"""

from collections.abc import Mapping
from typing import Protocol

from jaxtyping import Array, Float

from vsae_jax.autoencoder.arrays import ArraySpec
from vsae_jax.autoencoder.sparsifiers import batch_topk, jump_relu, none, topk
from vsae_jax.autoencoder.sparsifiers.sparse import Numbers, Sparse
from vsae_jax.config import SAEConfig

__all__ = ["SPARSIFIERS", "Numbers", "Sparse", "Sparsifier", "sparsifier_of"]


class Sparsifier(Protocol):
    """The names that a sparsifier's module has.

    ARRAYS: what it trains. BUFFERS: what it carries and does not train, saved beside
    `scale` and `mean`. THRESHOLD: which of them is what a latent has to be above, at
    evaluation. WHOLE_BATCH: it looks across the rows of a batch, which then is not cut
    into parts.
    """

    @property
    def ARRAYS(self) -> Mapping[str, ArraySpec]: ...
    @property
    def BUFFERS(self) -> Mapping[str, ArraySpec]: ...
    @property
    def THRESHOLD(self) -> str | None: ...
    @property
    def WHOLE_BATCH(self) -> bool: ...

    def apply(
        self,
        z: Float[Array, "batch d_sae"],
        arrays: Mapping[str, Array],
        numbers: Numbers,
        *,
        config: SAEConfig,
    ) -> Sparse:
        """f, the mask of selected latents, penalties by name and the new buffers, in
        training. `arrays` holds its ARRAYS and BUFFERS."""
        ...

    def encode(
        self,
        z: Float[Array, "batch d_sae"],
        arrays: Mapping[str, Array],
        *,
        config: SAEConfig,
    ) -> Float[Array, "batch d_sae"]:
        """f at evaluation, a function of each row alone."""
        ...


SPARSIFIERS: dict[str, Sparsifier] = {
    "none": none,
    "topk": topk,
    "batch_topk": batch_topk,
    "jump_relu": jump_relu,
}


def sparsifier_of(config: SAEConfig) -> Sparsifier:
    """The sparsifier that `config.sparsity` names."""
    return SPARSIFIERS[config.sparsity]
