"""Variational and ordinary sparse autoencoders on language-model activations."""

from vsae_jax import losses, runs
from vsae_jax.autoencoder import sae
from vsae_jax.autoencoder.sae import SAE, fold, init
from vsae_jax.autoencoder.sparsity import keep_top_k
from vsae_jax.config import ConvertConfig, ExtractConfig, SAEConfig, TrainConfig
from vsae_jax.interop.loading import load

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
    "losses",
    "runs",
    "sae",
]
