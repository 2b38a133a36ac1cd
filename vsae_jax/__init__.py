"""Variational and ordinary sparse autoencoders on language-model activations."""

from vsae_jax import losses, runs, splices
from vsae_jax.activations.shards import Activations
from vsae_jax.autoencoder import sae
from vsae_jax.autoencoder.module import SAE
from vsae_jax.autoencoder.sae import fold, init
from vsae_jax.autoencoder.sparsity import keep_top_k
from vsae_jax.config import ConvertConfig, ExtractConfig, SAEConfig, TrainConfig
from vsae_jax.interop.loading import load
from vsae_jax.lm import load_language_model as language_model

open_activations = Activations.open
__version__ = "0.1.0"

__all__ = [
    "SAE",
    "ConvertConfig",
    "ExtractConfig",
    "SAEConfig",
    "TrainConfig",
    "fold",
    "init",
    "keep_top_k",
    "load",
    "language_model",
    "losses",
    "open_activations",
    "runs",
    "sae",
    "splices",
]
