"""Variational and ordinary sparse autoencoders on language-model activations."""

from typing import TYPE_CHECKING, Any

from vsae_jax import losses, runs, splices
from vsae_jax.activations.shards import Activations
from vsae_jax.autoencoder import sae
from vsae_jax.autoencoder.sae import fold, init
from vsae_jax.autoencoder.sparsity import keep_top_k
from vsae_jax.config import ConvertConfig, ExtractConfig, SAEConfig, TrainConfig
from vsae_jax.interop.loading import load
from vsae_jax.lm import load_language_model as language_model
from vsae_jax.report.training_curves import plot_training
from vsae_jax.runs import TopLatents, TrainedSAE
from vsae_jax.system import version
from vsae_jax.training.fit import Fit, fit

if TYPE_CHECKING:
    from vsae_jax.autoencoder.module import SAE

open_activations = Activations.open
__version__ = version.VERSION

__all__ = [
    "SAE",
    "ConvertConfig",
    "ExtractConfig",
    "Fit",
    "SAEConfig",
    "TopLatents",
    "TrainConfig",
    "TrainedSAE",
    "fit",
    "fold",
    "init",
    "keep_top_k",
    "load",
    "language_model",
    "losses",
    "open_activations",
    "plot_training",
    "runs",
    "sae",
    "splices",
]


def __getattr__(name: str) -> Any:
    """`SAE` when it is first asked for: nothing else needs flax."""
    if name != "SAE":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from vsae_jax.autoencoder.module import SAE

    return SAE
