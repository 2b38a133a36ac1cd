"""Sparsifiers: which latents of a row stay. A file each, a row each in `SPARSIFIERS`.

A file is a module with the names of `Sparsifier`; a new one needs its row here, its
flags in `config`, and its variants in `config.presets`.
"""

from collections.abc import Mapping
from typing import Protocol

from vsae_jax.autoencoder.arrays import ArraySpec, Latents
from vsae_jax.autoencoder.sparsifiers import batch_topk, jump_relu, none, topk
from vsae_jax.autoencoder.sparsifiers.sparse import Arrays, Numbers, Sparse
from vsae_jax.config import SAEConfig

__all__ = ["SPARSIFIERS", "Numbers", "Sparse", "Sparsifier", "sparsifier_of"]


class Sparsifier(Protocol):
    """The names that a sparsifier's module has.

    ARRAYS: those that it trains.
    BUFFERS: those that it does not train, saved beside `scale` and `mean`.
    THRESHOLD: the one of them that a latent has to exceed at evaluation, if any.
    WHOLE_BATCH: whether it looks across rows, so that a batch must not be cut in parts.
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
        self, z: Latents, arrays: Arrays, numbers: Numbers, *, config: SAEConfig
    ) -> Sparse:
        """f, the mask of selected latents, penalties by name and the new buffers, in
        training. `arrays` holds its ARRAYS and BUFFERS."""
        ...

    def encode(self, z: Latents, arrays: Arrays, *, config: SAEConfig) -> Latents:
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
