"""What a command can be asked: one dataclass a command, its flags and presets."""

from vsae_jax.config.autoencoder import SAEConfig, sae_config
from vsae_jax.config.convert import ConvertConfig
from vsae_jax.config.dashboard import DashboardConfig
from vsae_jax.config.demo import DemoConfig
from vsae_jax.config.evaluate import EvalConfig
from vsae_jax.config.extract import (
    Backend,
    ExtractConfig,
    default_activations,
    resolve_extract,
    resolve_extracts,
)
from vsae_jax.config.features import FeaturesConfig
from vsae_jax.config.maximise import MaximiseConfig
from vsae_jax.config.opening import OpenOptions
from vsae_jax.config.plots import PlotsConfig
from vsae_jax.config.presets import Preset, Variant
from vsae_jax.config.processes import PROCESS_FIELDS
from vsae_jax.config.sites import Hook, Site, read_hook
from vsae_jax.config.train import RUNTIME_FIELDS, TrainConfig, resolve_train
from vsae_jax.config.tsne import MapConfig

__all__ = [
    "Backend",
    "ConvertConfig",
    "DashboardConfig",
    "DemoConfig",
    "EvalConfig",
    "ExtractConfig",
    "FeaturesConfig",
    "Hook",
    "MapConfig",
    "MaximiseConfig",
    "OpenOptions",
    "PROCESS_FIELDS",
    "PlotsConfig",
    "Preset",
    "RUNTIME_FIELDS",
    "SAEConfig",
    "Site",
    "TrainConfig",
    "Variant",
    "default_activations",
    "read_hook",
    "resolve_extract",
    "resolve_extracts",
    "resolve_train",
    "sae_config",
]
