"""The static part of an autoencoder, and how it follows from a training config."""

import dataclasses
from dataclasses import dataclass
from typing import Literal

from vsae_jax.config.presets import VARIANTS
from vsae_jax.config.train import TrainConfig
from vsae_jax.system.errors import UserError


@dataclass(frozen=True)
class SAEConfig:
    """The static part of an autoencoder: shapes, family and switches that recompile.

    The numbers that may be traced (k, beta, learning rate, ...) are those of
    `training.step.hparams`; `k` here is their upper bound and, in a trained run, k.
    """

    d_model: int
    d_sae: int
    sparsity: Literal["topk", "none", "batch_topk", "jump_relu"] = "topk"
    k: int = 64
    selection: Literal["value", "magnitude"] = "value"
    relu: bool = False
    noise: bool = True
    variance: Literal["fixed", "learned"] = "fixed"
    penalty: Literal["none", "kl", "l1"] = "kl"
    kl_over: Literal["all", "selected"] = "all"
    auxk: bool = False
    k_aux: int = 1
    auxk_units: Literal["loss", "variance"] = "loss"
    decoder_norm: Literal["unit", "free"] = "unit"
    subtract_b_dec: bool = True
    dtype: Literal["float32", "bfloat16"] = "float32"
    top_k: Literal["auto", "lax"] = "auto"
    l0: bool = dataclasses.field(default=False, metadata={"before": False})

    def __post_init__(self):
        if self.has_k and not 1 <= self.k <= self.d_sae:
            raise UserError(f"k={self.k} must lie between 1 and d_sae={self.d_sae}")

    @property
    def has_k(self) -> bool:
        """Whether k latents are kept, of each row or on average."""
        return self.sparsity in ("topk", "batch_topk")


def sae_config(
    config: TrainConfig, *, d_model: int, dtype: Literal["float32", "bfloat16"]
) -> SAEConfig:
    """The static part of a resolved training config."""
    sparsity = VARIANTS[config.variant]["sparsity"]
    if sparsity in ("topk", "batch_topk") and config.k > config.d_sae:
        raise UserError(f"--k={config.k} must not exceed --d_sae={config.d_sae}")
    _check_combination(config, sparsity)
    if config.k_aux > config.d_sae:
        raise UserError(f"--k_aux={config.k_aux} must not exceed d_sae={config.d_sae}")
    own, asked = (
        {field.name for field in dataclasses.fields(of)} for of in (SAEConfig, config)
    )
    # What both have under one name is passed on; the rest follows from it.
    settings = {name: getattr(config, name) for name in own & asked} | {
        "d_model": d_model,
        "sparsity": sparsity,
        "noise": config.noise_std > 0,
        "auxk": config.auxk > 0,
        "l0": config.l0 > 0,
        "dtype": dtype,
    }
    return SAEConfig(**settings)


def _check_combination(config: TrainConfig, sparsity: str) -> None:
    """Refuses what cannot be combined."""
    above = sparsity in ("batch_topk", "jump_relu")
    if above and config.selection == "magnitude":
        raise UserError(
            f"--selection=magnitude cannot be combined with --variant={config.variant},"
            " which at evaluation keeps what is above a threshold, so no negative "
            "latent; use --selection=value"
        )
    if sparsity == "batch_topk" and config.batch_size * config.d_sae >= 2**31:
        raise UserError(
            f"--batch_size={config.batch_size} times --d_sae={config.d_sae} must be "
            f"below 2^31 with --variant={config.variant}, which counts over the whole "
            "batch; lower --batch_size"
        )
    if sparsity != "jump_relu" and config.l0:
        raise UserError(
            f"--l0={config.l0} cannot be combined with --variant={config.variant}, "
            "which has no thresholds that it could train; use --l0=0, or jump_relu"
        )
