"""What `train` can be asked, and what the preset, the variant and the data make of it.

None means unset. `resolve_train` fills it, once; an explicit value always wins, and
zero is a value.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal

from vsae_jax.config.fields import (
    check_above_zero,
    check_at_least,
    check_below,
    fill,
    flag,
)
from vsae_jax.config.presets import (
    LEAST_LR_WARMUP_STEPS,
    VARIANTS,
    Preset,
    Variant,
    preset_flag,
    training_defaults,
)
from vsae_jax.config.processes import PROCESS_FLAGS, check_processes
from vsae_jax.system.errors import UserError


@dataclass(frozen=True)
class TrainConfig:
    """Trains sparse autoencoders on extracted activations. A comma list on any flag
    that takes one makes a grid, one run folder per arm.

    python -m vsae_jax.train --variant=topk,vsae_topk --k=32,64 --out=runs/grid
    """

    activations: str = flag(
        "folder that extract wrote; unset: where extract writes without flags",
        "",
        runtime=True,
        group="data",
    )
    out: str = flag(
        "run folder; unset: below runs/, named by its settings",
        "",
        runtime=True,
        group="record",
    )
    preset: Preset = flag(
        "whose settings to use where a flag is unset",
        "paper",
        grid=True,
        group="autoencoder",
    )
    variant: Variant = flag(
        "which autoencoder", "vsae_topk", grid=True, group="autoencoder"
    )
    k: int = preset_flag("k", "latents kept per row", group="autoencoder", traced=True)
    beta: float = preset_flag(
        "beta", "weight of the KL penalty", group="loss", traced=True
    )
    d_sae: int = preset_flag("d_sae", "number of latents", group="autoencoder")
    steps: int = preset_flag(
        "steps", "optimizer steps", group="optimisation", traced=True
    )
    batch_size: int = preset_flag("batch_size", "rows in a step", group="optimisation")
    lr: float | Literal["auto"] = preset_flag(
        "lr",
        "peak learning rate; auto = 2e-4 / sqrt(d_sae / 2^14)",
        group="optimisation",
        traced=True,
    )
    seed: int = flag("of the weights and the noise", 0, grid=True, group="optimisation")
    data_seed: int = flag("of the order of the rows", 0, group="data")
    dtype: Literal["auto", "float32", "bfloat16"] = flag(
        "of the matrix products; auto: bfloat16 on a GPU, else float32",
        "auto",
        group="devices",
    )
    relu: bool = preset_flag("relu", "relu on mu", group="autoencoder")
    noise_std: float = preset_flag(
        "noise_std",
        "standard deviation of the training noise (times a learned one)",
        group="autoencoder",
        traced=True,
    )
    variance: Literal["fixed", "learned"] = preset_flag(
        "variance",
        "of the posterior; learned adds a second encoder head",
        group="autoencoder",
    )
    gate: Literal["none", "path", "sigma"] = preset_flag(
        "gate",
        "what opens a latent: path, a second path of the encoder (gated); sigma, the "
        "1 - sigma of a learned variance (vaease)",
        group="gate",
        before="none",
    )
    closed_below: float = flag(
        "gate sigma: at evaluation a latent whose gate is not above this is 0",
        0.05,
        grid=True,
        group="gate",
        before=0.05,
    )
    prefixes: str = preset_flag(
        "prefixes",
        "nested decoder: how many of the first latents reconstruct x alone, too, as "
        "shares or numbers of d_sae between colons; or none",
        group="autoencoder",
        before="none",
    )
    selection: Literal["value", "magnitude"] = preset_flag(
        "selection",
        "top-k keeps the largest values or the largest magnitudes",
        group="autoencoder",
    )
    penalty: Literal["none", "kl", "l1"] = preset_flag(
        "penalty", "which penalty is on", group="loss"
    )
    kl_over: Literal["all", "selected"] = preset_flag(
        "kl_over", "latents that the KL sums over", group="loss"
    )
    kl_units: Literal["loss", "error"] = preset_flag(
        "kl_units",
        "the KL as it is, or times twice the error of a dimension, as with a learned "
        "variance of the decoder",
        group="loss",
        before="loss",
    )
    l1: float = preset_flag("l1", "weight of the L1 penalty", group="loss", traced=True)
    l0: float = preset_flag(
        "l0",
        "jump_relu: weight of the L0 penalty",
        group="loss",
        traced=True,
        before=0.0,
    )
    gate_l1: float = preset_flag(
        "gate_l1",
        "gate path: weight of the L1 penalty on relu of the gate",
        group="gate",
        traced=True,
        before=0.0,
    )
    gate_error: float = preset_flag(
        "gate_error",
        "gate path: weight of the error of decoding relu of the gate",
        group="gate",
        traced=True,
        before=1.0,
    )
    nested: float = preset_flag(
        "nested",
        "weight of the summed errors of the prefixes",
        group="loss",
        traced=True,
        before=1.0,
    )
    target_l0: float = preset_flag(
        "target_l0",
        "jump_relu: the penalty is (L0 / target - 1)^2; 0: it is L0",
        group="thresholds",
        traced=True,
        before=0.0,
    )
    bandwidth: float = preset_flag(
        "bandwidth",
        "jump_relu: width over which a threshold has a gradient, in latents' units",
        group="thresholds",
        traced=True,
        before=0.001,
    )
    threshold_init: float = preset_flag(
        "threshold_init",
        "jump_relu: where the thresholds start",
        group="thresholds",
        before=0.001,
    )
    auxk: float = preset_flag(
        "auxk",
        "weight of AuxK, which revives latents",
        group="loss",
        traced=True,
    )
    k_aux: int = preset_flag("k_aux", "dead latents that AuxK uses", group="loss")
    dead_after_tokens: int = preset_flag(
        "dead_after_tokens",
        "rows without firing after which a latent is dead",
        group="loss",
        traced=True,
    )
    auxk_units: Literal["loss", "variance"] = preset_flag(
        "auxk_units",
        "AuxK in the loss's units, or divided by the residual's variance",
        group="loss",
    )
    threshold_decay: float = preset_flag(
        "threshold_decay",
        "batch_topk: what stays of its running threshold in a step",
        group="thresholds",
        traced=True,
        before=0.99,
    )
    decoder_norm: Literal["unit", "free"] = preset_flag(
        "decoder_norm", "decoder rows kept at norm 1, or free", group="autoencoder"
    )
    decoder_init_norm: float = preset_flag(
        "decoder_init_norm",
        "norm of the decoder's rows at the start",
        group="autoencoder",
    )
    subtract_b_dec: bool = preset_flag(
        "subtract_b_dec", "subtract b_dec from the input", group="autoencoder"
    )
    b_dec_init: Literal["zeros", "geometric_median"] = preset_flag(
        "b_dec_init", "where b_dec starts", group="autoencoder"
    )
    input_scale: float | Literal["unit", "sqrt_d", "none"] = preset_flag(
        "input_scale",
        "root mean square row norm that rows are scaled to: 1, sqrt(d_model), as they "
        "are, or a number",
        group="data",
    )
    center_input: bool = flag(
        "subtract the rows' mean from the input", False, group="data"
    )
    lr_warmup_steps: int = preset_flag(
        "lr_warmup_steps",
        "linear warm-up of the learning rate",
        group="optimisation",
        traced=True,
    )
    lr_decay_start: int = preset_flag(
        "lr_decay_start",
        "step from which the learning rate falls linearly to 0",
        group="optimisation",
        traced=True,
    )
    kl_warmup_steps: int = preset_flag(
        "kl_warmup_steps",
        "steps over which beta, l0 and gate_l1 rise linearly from 0",
        group="loss",
        traced=True,
    )
    clip_norm: float = preset_flag(
        "clip_norm",
        "largest gradient norm",
        group="optimisation",
        traced=True,
    )
    adam_b1: float = preset_flag(
        "adam_b1", "decay of Adam's first moment", group="optimisation", traced=True
    )
    adam_b2: float = flag(
        "decay of Adam's second moment", 0.999, group="optimisation", traced=True
    )
    adam_eps: float = flag("Adam's epsilon", 1e-8, group="optimisation", traced=True)
    held_out: float = flag(
        "share of the contexts, the last, never trained on", 0.05, group="data"
    )
    top_k: Literal["auto", "lax", "kernel"] = flag(
        "lax: jax.lax.top_k and autodiff, the plain reference; auto: the fast way; "
        "kernel: that with a kernel for GPUs",
        "auto",
        group="devices",
    )
    kernels: Literal["auto", "xla", "native"] = flag(
        "of a TopK step on a CPU: native touches the selected latents only (pip "
        "install -e '.[native]'); auto: where that is installed and wins",
        "auto",
        group="devices",
        before="auto",
    )
    arms: Literal["auto", "vmap", "loop"] = flag(
        "a grid's arms on the same batches: vmap at once, loop one after another; "
        "auto: vmap on a GPU",
        "auto",
        runtime=True,
        group="devices",
    )
    feed: Literal["auto", "device", "stream"] = flag(
        "stream reads batches ahead, device puts all rows there once; auto: device on "
        "a GPU with room",
        "auto",
        runtime=True,
        group="devices",
    )
    mesh: str = flag(
        "devices on each axis, as data:4,latents:2: the rows of a batch are split over "
        "data, the latents over latents; unset: all devices on data",
        "",
        runtime=True,
        group="devices",
    )
    coordinator: str = flag(
        PROCESS_FLAGS["coordinator"], "", runtime=True, group="devices"
    )
    num_processes: int | None = flag(
        PROCESS_FLAGS["num_processes"], runtime=True, group="devices"
    )
    process_id: int | None = flag(
        PROCESS_FLAGS["process_id"], runtime=True, group="devices"
    )
    bad_rows: Literal["stop", "skip"] = flag(
        "rows that are NaN, infinite or giant: stop at the first that is read, or read "
        "all rows before the start and leave such rows out",
        "stop",
        runtime=True,
        group="data",
    )
    giant: float = flag(
        "a row is giant when it has a value beyond so many times the median norm",
        1e4,
        runtime=True,
        group="data",
    )
    stream: bool = flag(
        "train on the text after that in --activations, its rows made as they are "
        "needed and never on disk",
        False,
        group="data",
        before=False,
    )
    buffer_rows: int = flag(
        "with --stream: rows in memory that are shuffled among each other",
        2**17,
        group="data",
        before=2**17,
    )
    max_norm_multiple: float | None = flag(
        "leave rows out whose norm is above so many times the median, as a language "
        "model's massive activations are; 10 is dictionary_learning's; unset: none",
        runtime=True,
        group="data",
    )
    fork_from: str = flag(
        "run to start from: its last checkpoint, in a new --out; of a grid's folder, "
        "the arm of the same name",
        "",
        runtime=True,
        group="record",
    )
    checkpoint_every: int = flag(
        "steps between checkpoints; 0: none, and a kill costs the whole run",
        1000,
        runtime=True,
        group="record",
    )
    log_every: int = flag(
        "steps between lines of metrics.jsonl", 50, runtime=True, group="record"
    )
    steps_per_dispatch: int = flag(
        "steps in one call to the device", 10, runtime=True, group="devices"
    )
    verify: bool = flag(
        "read every shard and compare checksums before the start; unset: each shard "
        "at its first use",
        False,
        runtime=True,
        group="record",
    )
    tensorboard: bool = flag(
        "write TensorBoard events to the run folder",
        False,
        runtime=True,
        group="record",
    )
    wandb: bool = flag("log to Weights & Biases", False, runtime=True, group="record")

    def __post_init__(self):
        check_at_least(self, 1, "k", "d_sae", "steps", "batch_size", "k_aux")
        check_at_least(self, 1, "buffer_rows", "log_every", "steps_per_dispatch")
        check_at_least(self, 0, "checkpoint_every")
        check_at_least(self, 0, "beta", "noise_std", "l1", "auxk", "dead_after_tokens")
        check_at_least(self, 0, "seed", "data_seed", "adam_b1", "adam_b2")
        check_at_least(self, 0, "threshold_decay", "l0", "target_l0", "closed_below")
        check_at_least(self, 0, "gate_l1", "gate_error", "nested")
        check_at_least(self, 0, "lr_warmup_steps", "lr_decay_start", "kl_warmup_steps")
        check_above_zero(self, "lr", "clip_norm", "adam_eps", "input_scale")
        check_above_zero(self, "decoder_init_norm", "giant", "max_norm_multiple")
        check_above_zero(self, "bandwidth", "threshold_init")
        check_below(self, 1, "adam_b1", "adam_b2", "threshold_decay", "held_out")
        check_below(self, 1, "closed_below")
        # They are int32 on the device.
        check_below(self, 2**31, "k", "steps", "dead_after_tokens")
        check_below(self, 2**31, "lr_warmup_steps", "lr_decay_start", "kl_warmup_steps")
        if self.held_out <= 0:
            raise UserError(f"--held_out={self.held_out} must lie between 0 and 1")
        both = self.k is not None and self.d_sae is not None
        has_k = "topk" in VARIANTS[self.variant]["sparsity"]
        if has_k and both and self.k > self.d_sae:
            raise UserError(f"--k={self.k} must not exceed --d_sae={self.d_sae}")
        check_processes(self)
        leaves_out = self.bad_rows == "skip" or self.max_norm_multiple is not None
        if self.stream and (leaves_out or self.feed == "device"):
            raise UserError(
                "--stream makes rows as they are needed: none can be left out before "
                "(--bad_rows=skip, --max_norm_multiple) nor lie on the device "
                "(--feed=device)"
            )
        for name in ("seed", "data_seed"):
            if getattr(self, name) >= 2**32:
                raise UserError(f"--{name}={getattr(self, name)} must be below 2^32")


# Changing one of these leaves the result of a run unchanged, so a resumed run may. What
# `bad_rows`, `giant`, `max_norm_multiple` and `fork_from` did to it is in its `data`.
RUNTIME_FIELDS = frozenset(
    field.name for field in dataclasses.fields(TrainConfig) if field.metadata["runtime"]
)


def resolve_train(config: TrainConfig, *, d_model: int) -> TrainConfig:
    """The config with every unset field filled: preset < variant < explicit value.

    Data-dependent defaults: `lr=auto`, `k_aux = d_model / 2`, warm-ups as shares of
    `steps` (learning rate 2 %, with `released` at least 200 steps; KL 10 %; decay from
    80 %), `dead_after_tokens` as 5 % of the run's rows where the preset does not say.
    """
    config = fill(config, training_defaults(config.preset, config.variant))
    rows = config.steps * config.batch_size
    lr = config.lr
    if lr == "auto":
        lr = 2e-4 / math.sqrt(config.d_sae / 2**14)
    config = dataclasses.replace(config, lr=lr)
    return fill(
        config,
        {
            "k_aux": min(max(d_model // 2, 1), config.d_sae),
            "dead_after_tokens": min(rows // 20, 2**30),
            "lr_warmup_steps": max(
                config.steps // 50, LEAST_LR_WARMUP_STEPS[config.preset]
            ),
            "lr_decay_start": config.steps * 4 // 5,
            "kl_warmup_steps": config.steps // 10,
        },
    )
