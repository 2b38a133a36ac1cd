"""The static part of an autoencoder, and how it follows from a training config."""

import dataclasses
import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal

from vsae_jax.config.presets import VARIANTS
from vsae_jax.config.train import TrainConfig
from vsae_jax.system.errors import UserError


def _younger(value: Any) -> Any:
    """A field with its default, which is its value in files that are older than it."""
    return dataclasses.field(default=value, metadata={"before": value})


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
    top_k: Literal["auto", "lax", "kernel"] = "auto"
    l0: bool = _younger(False)
    gate: Literal["none", "path", "sigma"] = _younger("none")
    closed_below: float = _younger(0.05)
    kl_units: Literal["loss", "error"] = _younger("loss")
    prefixes: str = _younger("none")
    noise_at: Literal["latents", "input", "kept"] = _younger("latents")

    def __post_init__(self):
        if self.has_k and not 1 <= self.k <= self.d_sae:
            raise UserError(f"k={self.k} must lie between 1 and d_sae={self.d_sae}")
        if self.gate == "sigma" and self.variance == "fixed":
            raise UserError(
                "gate=sigma needs variance=learned: it is 1 - sigma of each row"
            )
        if self.gate != "none" and self.sparsity != "none":
            raise UserError(
                f"gate={self.gate} cannot be combined with {self.sparsity}: the gate "
                "chooses the latents; use a variant without another sparsifier (relu, "
                "vsae, gated, vsae_gated, vaease)"
            )
        if not re.fullmatch(r"none|\d{1,9}(:\d{1,9})*", self.prefixes) or list(
            self.widths
        ) != sorted({*self.widths} - {0}):
            raise UserError(
                f"prefixes={self.prefixes} are no rising numbers of latents, as 64:128"
            )

    @property
    def widths(self) -> tuple[int, ...]:
        """Of a nested decoder: how many of the first latents reconstruct x alone."""
        none = self.prefixes == "none"
        return () if none else tuple(map(int, self.prefixes.split(":")))

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
        "prefixes": _prefixes(config),
        "dtype": dtype,
    }
    static = SAEConfig(**settings)
    _check_combination(config, sparsity)
    return static


def _prefixes(config: TrainConfig) -> str:
    """`--prefixes` as numbers of latents: shares of d_sae rounded down."""
    if config.prefixes == "none":
        return "none"
    try:
        parts = [Fraction(part) for part in config.prefixes.split(":")]
        widths = [int(p * config.d_sae if p < 1 else p) for p in parts]
    except (ValueError, ZeroDivisionError):
        widths = []
    if not widths or widths != sorted({*widths}) or not 0 < widths[0]:
        widths = []
    if not widths or widths[-1] >= config.d_sae:
        raise UserError(
            f"--prefixes={config.prefixes} must be rising shares or numbers of the "
            f"--d_sae={config.d_sae} latents, each of at least one and fewer than all, "
            "as 1/4:1/2, or none"
        )
    return ":".join(map(str, widths))


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
    if config.noise_at != "latents" and config.variance == "learned":
        raise UserError(
            f"--noise_at={config.noise_at} cannot be combined with --variance=learned, "
            "which is a variance of the latents; use --noise_at=latents, or "
            "--variance=fixed"
        )
    if config.gate != "none" and config.auxk:
        raise UserError(
            f"--auxk={config.auxk} cannot be combined with --gate={config.gate}: AuxK "
            "trains the sizes of latents and opens no gate; use --auxk=0"
        )
    if sparsity != "jump_relu" and config.l0:
        raise UserError(
            f"--l0={config.l0} cannot be combined with --variant={config.variant}, "
            "which has no thresholds that it could train; use --l0=0, or jump_relu"
        )
