"""What a command can be asked: one dataclass a command, its flags and presets."""

from vsae_jax.config.train import (
    PROCESS_FIELDS,
    RUNTIME_FIELDS,
    Backend,
    ConvertConfig,
    EvalConfig,
    ExtractConfig,
    Preset,
    SAEConfig,
    TrainConfig,
    Variant,
    default_activations,
    hook_name,
    resolve_extract,
    resolve_train,
    sae_config,
)

__all__ = [
    "Backend",
    "ConvertConfig",
    "EvalConfig",
    "ExtractConfig",
    "PROCESS_FIELDS",
    "Preset",
    "RUNTIME_FIELDS",
    "SAEConfig",
    "TrainConfig",
    "Variant",
    "default_activations",
    "hook_name",
    "resolve_extract",
    "resolve_train",
    "sae_config",
]
