"""What `train` can be asked, and what the preset, the variant and the data make of it.

None means unset. `resolve_train` fills it, once; an explicit value always wins, and
zero is a value.
"""

import dataclasses
import math
from dataclasses import dataclass
from functools import partial
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

# The headings of `--help`, each with what most flags below it have in common.
_autoencoder = partial(preset_flag, group="autoencoder")
_gate = partial(preset_flag, group="gate")
_thresholds = partial(preset_flag, group="thresholds")
_loss = partial(preset_flag, group="loss")
_optimisation = partial(preset_flag, group="optimisation")
_data = partial(flag, group="data")
_record = partial(flag, group="record", runtime=True)
_devices = partial(flag, group="devices", runtime=True)


@dataclass(frozen=True)
class TrainConfig:
    """Trains sparse autoencoders on extracted activations. A comma list on any flag
    that takes one makes a grid, one run folder per arm.

    python -m vsae_jax.train --variant=topk,vsae_topk --k=32,64 --out=runs/grid
    """

    activations: str = _data(
        "folder that extract wrote; unset: where extract writes without flags",
        "",
        runtime=True,
    )
    out: str = _record("run folder; unset: below runs/, named by its settings", "")
    preset: Preset = flag(
        "whose settings to use where a flag is unset",
        "paper",
        grid=True,
        group="autoencoder",
    )
    variant: Variant = flag(
        "which autoencoder", "vsae_topk", grid=True, group="autoencoder"
    )
    k: int = _autoencoder("latents kept per row", traced=True)
    beta: float = _loss("weight of the KL penalty", traced=True)
    d_sae: int = _autoencoder("number of latents")
    steps: int = _optimisation("optimizer steps", traced=True)
    batch_size: int = _optimisation("rows in a step")
    lr: float | Literal["auto"] = _optimisation(
        "peak learning rate; auto = 2e-4 / sqrt(d_sae / 2^14)", traced=True
    )
    seed: int = flag("seed of weights and noise", 0, grid=True, group="optimisation")
    data_seed: int = _data("seed of the order of the rows", 0)
    dtype: Literal["auto", "float32", "bfloat16"] = flag(
        "dtype of the matrix products; auto: bfloat16 on a GPU, else float32",
        "auto",
        group="devices",
    )
    relu: bool = _autoencoder("apply relu to mu")
    noise_std: float = _autoencoder(
        "standard deviation of the training noise (times a learned one)", traced=True
    )
    noise_at: Literal["latents", "input", "kept"] = _autoencoder(
        "where the noise is added: latents, before the selection; input, scaled rows "
        "that the encoder sees; kept, as a factor 1 + noise on each kept latent",
        before="latents",
    )
    variance: Literal["fixed", "learned"] = _autoencoder(
        "variance of the posterior; learned adds a second encoder head"
    )
    gate: Literal["none", "path", "sigma"] = _gate(
        "what opens a latent: path, a second path of the encoder (gated); sigma, the "
        "1 - sigma of a learned variance (vaease)",
        before="none",
    )
    closed_below: float = flag(
        "gate sigma: at evaluation a latent whose gate is not above this is 0",
        0.05,
        grid=True,
        group="gate",
        before=0.05,
    )
    prefixes: str = _autoencoder(
        "nested decoder: how many of the first latents also reconstruct x alone, as "
        "rising shares or numbers of d_sae such as 1/4:1/2; or none",
        before="none",
    )
    selection: Literal["value", "magnitude"] = _autoencoder(
        "top-k keeps the largest values or the largest magnitudes"
    )
    penalty: Literal["none", "kl", "l1"] = _loss("which penalty is on")
    kl_over: Literal["all", "selected"] = _loss("latents that the KL sums over")
    kl_units: Literal["loss", "error"] = _loss(
        "loss: the KL as it is; error: times twice the error per dimension, as with a "
        "learned variance of the decoder",
        before="loss",
    )
    l1: float = _loss("weight of the L1 penalty", traced=True)
    l0: float = _loss("jump_relu: weight of the L0 penalty", traced=True, before=0.0)
    gate_l1: float = _gate(
        "gate path: weight of the L1 penalty on relu of the gate",
        traced=True,
        before=0.0,
    )
    gate_error: float = _gate(
        "gate path: weight of the error of decoding relu of the gate",
        traced=True,
        before=1.0,
    )
    nested: float = _loss(
        "weight of the summed errors of the prefixes", traced=True, before=1.0
    )
    target_l0: float = _thresholds(
        "jump_relu: the penalty is (L0 / target - 1)^2; 0: it is L0",
        traced=True,
        before=0.0,
    )
    bandwidth: float = _thresholds(
        "jump_relu: width over which a threshold has a gradient, in latents' units",
        traced=True,
        before=0.001,
    )
    threshold_init: float = _thresholds(
        "jump_relu: where the thresholds start", before=0.001
    )
    auxk: float = _loss("weight of AuxK, which revives latents", traced=True)
    k_aux: int = _loss("dead latents that AuxK uses")
    dead_after_tokens: int = _loss(
        "rows without firing after which a latent is dead", traced=True
    )
    auxk_units: Literal["loss", "variance"] = _loss(
        "AuxK in the loss's units, or divided by the residual's variance"
    )
    threshold_decay: float = _thresholds(
        "batch_topk: share of the running threshold that a step keeps",
        traced=True,
        before=0.99,
    )
    decoder_norm: Literal["unit", "free"] = _autoencoder(
        "decoder rows kept at norm 1, or free"
    )
    decoder_init_norm: float = _autoencoder("norm of the decoder's rows at the start")
    subtract_b_dec: bool = _autoencoder("subtract b_dec from the input")
    b_dec_init: Literal["zeros", "geometric_median"] = _autoencoder(
        "where b_dec starts"
    )
    input_scale: float | Literal["unit", "sqrt_d", "none"] = preset_flag(
        "root mean square norm that rows are scaled to: unit is 1, sqrt_d is "
        "sqrt(d_model), none leaves them as they are, or a number",
        group="data",
    )
    center_input: bool = _data("subtract the rows' mean from the input", False)
    lr_warmup_steps: int = _optimisation(
        "linear warm-up of the learning rate", traced=True
    )
    lr_decay_start: int = _optimisation(
        "step from which the learning rate falls linearly to 0", traced=True
    )
    kl_warmup_steps: int = _loss(
        "steps over which beta, l0 and gate_l1 rise linearly from 0", traced=True
    )
    clip_norm: float = _optimisation("largest gradient norm", traced=True)
    adam_b1: float = _optimisation("decay of Adam's first moment", traced=True)
    adam_b2: float = flag(
        "decay of Adam's second moment", 0.999, group="optimisation", traced=True
    )
    adam_eps: float = flag("Adam's epsilon", 1e-8, group="optimisation", traced=True)
    held_out: float = _data("share of the contexts, the last ones, to hold out", 0.05)
    top_k: Literal["auto", "lax", "kernel"] = flag(
        "lax: jax.lax.top_k and autodiff, the plain reference; auto: a faster way; "
        "kernel: the same with a kernel for GPUs",
        "auto",
        group="devices",
    )
    kernels: Literal["auto", "xla", "native"] = flag(
        "how a CPU computes a TopK step: native touches only the selected latents (pip "
        "install -e '.[native]'); auto: native where it is installed and faster",
        "auto",
        group="devices",
        before="auto",
    )
    arms: Literal["auto", "vmap", "loop"] = _devices(
        "how a grid's arms take the same batch: vmap all at once, loop one after "
        "another; auto: vmap on a GPU",
        "auto",
    )
    feed: Literal["auto", "device", "stream"] = _devices(
        "stream reads batches ahead, device puts all rows on the device once; auto: "
        "device on a GPU with room",
        "auto",
    )
    mesh: str = _devices(
        "devices per axis, as data:4,latents:2: the rows of a batch are split over "
        "data, the latents over latents; unset: all devices on data",
        "",
    )
    coordinator: str = _devices(PROCESS_FLAGS["coordinator"], "")
    num_processes: int | None = _devices(PROCESS_FLAGS["num_processes"])
    process_id: int | None = _devices(PROCESS_FLAGS["process_id"])
    bad_rows: Literal["stop", "skip"] = _data(
        "rows that are NaN, infinite or giant: stop at the first one, or skip them "
        "(all rows are then read before the start)",
        "stop",
        runtime=True,
    )
    giant: float = _data(
        "a row is giant if one of its values exceeds this many times the median norm",
        1e4,
        runtime=True,
    )
    stream: bool = _data(
        "train on the text that follows that of --activations; its rows are made as "
        "they are needed and never stored",
        False,
        before=False,
    )
    buffer_rows: int = _data(
        "with --stream: rows held in memory and shuffled together",
        2**17,
        before=2**17,
    )
    max_norm_multiple: float | None = _data(
        "leave out rows whose norm exceeds this many times the median, such as massive "
        "activations; dictionary_learning has 10; unset: leave out none",
        runtime=True,
    )
    fork_from: str = _record(
        "run whose last checkpoint to start from, in a new --out; in a grid's folder, "
        "the arm of the same name",
        "",
    )
    checkpoint_every: int = _record(
        "steps between checkpoints; 0: none, so that a kill costs the whole run", 1000
    )
    log_every: int = _record("steps between lines of metrics.jsonl", 50)
    steps_per_dispatch: int = _devices("steps in one call to the device", 10)
    verify: bool = _record(
        "read every shard and compare checksums before the start; unset: each shard "
        "at its first use",
        False,
    )
    tensorboard: bool = _record("write TensorBoard events to the run folder", False)
    wandb: bool = _record("log to Weights & Biases", False)

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
