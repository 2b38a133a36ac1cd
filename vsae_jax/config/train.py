"""What a run is: frozen dataclasses, one field per flag.

None means unset. `resolve_*` fills it from the preset and the variant, once; an
explicit value always wins, and zero is a value.
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
    preset_flag,
)
from vsae_jax.config.presets import EXTRACT_PRESETS, VARIANTS, training_defaults
from vsae_jax.system.errors import UserError
from vsae_jax.system.processes import check_flags as check_processes

Preset = Literal["paper", "released", "baseline"]
Variant = Literal["relu", "topk", "vsae", "vsae_topk"]
Backend = Literal["transformers", "jax", "auto"]
_COORDINATOR = (
    "several processes: HOST:PORT of the first one, the same for all; auto: from the "
    "cluster's environment (SLURM, Open MPI, ...)"
)
_NUM_PROCESSES = "processes of the run, with --coordinator=HOST:PORT"
_PROCESS_ID = "which of them this is, from 0"


@dataclass(frozen=True)
class ExtractConfig:
    """Runs a language model over text once and writes its residual activations to
    memory-mapped NumPy shards."""

    preset: Preset = flag("whose settings to use where a flag is unset", "paper")
    model: str = flag("hub id or local folder", "EleutherAI/pythia-70m-deduped")
    revision: str = flag("hub revision: branch, tag or commit", "")
    backend: Backend = flag(
        "transformers needs torch; jax is GPT-NeoX only", "transformers"
    )
    layer: int = preset_flag(
        "layer", "block whose output is kept, from 0", table="extract"
    )
    dataset: str = flag(
        "hub id, or a local .jsonl, .txt or .parquet", "roneneldan/TinyStories"
    )
    split: str = flag("split of a hub data set", "train")
    text_column: str = flag("column that holds the text", "text")
    num_tokens: int = preset_flag(
        "num_tokens", "tokens to run through the model", table="extract"
    )
    context_length: int = flag("tokens in a context, BOS included", 128)
    bos: Literal["keep", "drop", "none"] = preset_flag(
        "bos",
        "every context starts with BOS: keep its row, drop its row, or add no BOS",
        table="extract",
    )
    skip_positions: int = flag(
        "first text positions of a context, after BOS, whose rows are dropped", 0
    )
    center_residual: bool = preset_flag(
        "center_residual",
        "subtract each row's mean over d_model, as TransformerLens does",
        table="extract",
    )
    dtype: Literal["bfloat16", "float16", "float32"] = flag(
        "of the rows on disk", "bfloat16"
    )
    coordinator: str = flag(_COORDINATOR, "")
    num_processes: int | None = flag(_NUM_PROCESSES)
    process_id: int | None = flag(_PROCESS_ID)
    batch_size: int = flag("contexts in a forward pass", 32)
    shard_contexts: int = flag("contexts in a shard", 2048)
    verify: bool = flag("read every shard that is there and compare checksums", False)
    out: str = flag(
        "folder for the shards; unset: activations/<model>/blocks.<layer>"
        ".hook_resid_post",
        "",
    )

    def __post_init__(self):
        check_at_least(
            self, 1, "num_tokens", "batch_size", "shard_contexts", "context_length"
        )
        check_at_least(self, 0, "layer", "skip_positions")
        check_processes(self)
        if self.dropped_positions >= self.context_length:
            raise UserError(
                f"--context_length={self.context_length} leaves no row after dropping "
                f"{self.dropped_positions} positions; raise it or drop fewer"
            )

    @property
    def dropped_positions(self) -> int:
        """Leading positions of a context that get no activation row."""
        return self.skip_positions + (self.bos == "drop")


def resolve_extract(config: ExtractConfig) -> ExtractConfig:
    """The config with every unset field filled from its preset."""
    config = fill(config, EXTRACT_PRESETS[config.preset])
    if config.out:
        return config
    out = default_activations(config.model, config.layer)
    return dataclasses.replace(config, out=out)


def default_activations(model: str, layer: int) -> str:
    """Where `extract` writes and `train` reads when neither is told."""
    name = model.rstrip("/").rsplit("/", 1)[-1]
    return f"activations/{name}/{hook_name(layer)}"


def hook_name(layer: int) -> str:
    """The residual stream after block `layer`, in TransformerLens' words."""
    return f"blocks.{layer}.hook_resid_post"


@dataclass(frozen=True)
class TrainConfig:
    """Trains sparse autoencoders on extracted activations. A comma list on any flag
    that takes one makes a grid, one run folder per arm."""

    activations: str = flag("folder that extract wrote; unset: its default place", "")
    out: str = flag("run folder; unset: below runs/, named by its settings", "")
    preset: Preset = flag(
        "whose settings to use where a flag is unset", "paper", sweep=True
    )
    variant: Variant = flag("which autoencoder", "vsae_topk", sweep=True)
    k: int = preset_flag("k", "latents kept per row")
    beta: float = preset_flag("beta", "weight of the KL penalty")
    d_sae: int = preset_flag("d_sae", "number of latents")
    steps: int = preset_flag("steps", "optimizer steps")
    batch_size: int = preset_flag("batch_size", "rows in a step")
    lr: float | Literal["auto"] = preset_flag(
        "lr", "peak learning rate; auto = 2e-4 / sqrt(d_sae / 2^14)"
    )
    seed: int = flag("of the weights and the noise", 0, sweep=True)
    data_seed: int = flag("of the order of the rows", 0)
    dtype: Literal["auto", "float32", "bfloat16"] = flag(
        "of the matrix products; auto: bfloat16 on a GPU, else float32", "auto"
    )
    relu: bool = preset_flag("relu", "relu on mu")
    noise_std: float = preset_flag(
        "noise_std", "standard deviation of the training noise (times a learned one)"
    )
    variance: Literal["fixed", "learned"] = preset_flag(
        "variance", "of the posterior; learned adds a second encoder head"
    )
    selection: Literal["value", "magnitude"] = preset_flag(
        "selection", "top-k keeps the largest values or the largest magnitudes"
    )
    penalty: Literal["none", "kl", "l1"] = preset_flag("penalty", "which penalty is on")
    kl_over: Literal["all", "selected"] = preset_flag(
        "kl_over", "latents that the KL sums over"
    )
    l1: float = preset_flag("l1", "weight of the L1 penalty")
    auxk: float = preset_flag("auxk", "weight of AuxK, which revives latents")
    k_aux: int = preset_flag("k_aux", "dead latents that AuxK uses")
    dead_after_tokens: int = preset_flag(
        "dead_after_tokens", "rows without firing after which a latent is dead"
    )
    auxk_units: Literal["loss", "variance"] = preset_flag(
        "auxk_units",
        "AuxK in the loss's units, or divided by the residual's variance",
    )
    decoder_norm: Literal["unit", "free"] = preset_flag(
        "decoder_norm", "decoder rows kept at norm 1, or free"
    )
    decoder_init_norm: float = preset_flag(
        "decoder_init_norm", "norm of the decoder's rows at the start"
    )
    subtract_b_dec: bool = preset_flag(
        "subtract_b_dec", "subtract b_dec from the input"
    )
    b_dec_init: Literal["zeros", "geometric_median"] = preset_flag(
        "b_dec_init", "where b_dec starts"
    )
    input_scale: float | Literal["unit", "sqrt_d", "none"] = preset_flag(
        "input_scale",
        "root mean square row norm that rows are scaled to: 1, sqrt(d_model), as they "
        "are, or a number",
    )
    center_input: bool = flag("subtract the rows' mean from the input", False)
    lr_warmup_steps: int = preset_flag(
        "lr_warmup_steps", "linear warm-up of the learning rate"
    )
    lr_decay_start: int = preset_flag(
        "lr_decay_start", "step from which the learning rate falls linearly to 0"
    )
    kl_warmup_steps: int = preset_flag(
        "kl_warmup_steps", "steps over which beta rises linearly from 0"
    )
    clip_norm: float = preset_flag("clip_norm", "largest gradient norm")
    adam_b1: float = flag("decay of Adam's first moment", 0.9)
    adam_b2: float = flag("decay of Adam's second moment", 0.999)
    adam_eps: float = flag("Adam's epsilon", 1e-8)
    held_out: float = flag("share of the contexts, the last, never trained on", 0.05)
    top_k: Literal["auto", "lax"] = flag(
        "lax: jax.lax.top_k and autodiff, the plain reference; auto: the fast way",
        "auto",
    )
    arms: Literal["auto", "vmap", "loop"] = flag(
        "a grid's arms on the same batches: vmap at once, loop one after another; "
        "auto: vmap on a GPU",
        "auto",
    )
    feed: Literal["auto", "device", "stream"] = flag(
        "stream reads batches ahead, device puts all rows there once; auto: device on "
        "a GPU with room",
        "auto",
    )
    mesh: str = flag(
        "devices on each axis, as data:4,latents:2: the rows of a batch are split over "
        "data, the latents over latents; unset: all devices on data",
        "",
    )
    coordinator: str = flag(_COORDINATOR, "")
    num_processes: int | None = flag(_NUM_PROCESSES)
    process_id: int | None = flag(_PROCESS_ID)
    bad_rows: Literal["stop", "skip"] = flag(
        "rows that are NaN, infinite or giant: stop at the first that is read, or read "
        "all rows before the start and leave such rows out",
        "stop",
    )
    giant: float = flag(
        "a row is giant when it has a value beyond so many times the median norm", 1e4
    )
    fork_from: str = flag(
        "run to start from: its last checkpoint, in a new --out; of a grid's folder, "
        "the arm of the same name",
        "",
    )
    checkpoint_every: int = flag("steps between checkpoints", 1000)
    log_every: int = flag("steps between lines of metrics.jsonl", 50)
    steps_per_dispatch: int = flag("steps in one call to the device", 10)
    verify: bool = flag(
        "read every shard and compare checksums before the start; unset: each shard "
        "at its first use",
        False,
    )
    tensorboard: bool = flag("write TensorBoard events to the run folder", False)
    wandb: bool = flag("log to Weights & Biases", False)

    def __post_init__(self):
        check_at_least(self, 1, "k", "d_sae", "steps", "batch_size", "k_aux")
        check_at_least(self, 1, "checkpoint_every", "log_every", "steps_per_dispatch")
        check_at_least(self, 0, "beta", "noise_std", "l1", "auxk", "dead_after_tokens")
        check_at_least(self, 0, "seed", "data_seed", "adam_b1", "adam_b2")
        check_at_least(self, 0, "lr_warmup_steps", "lr_decay_start", "kl_warmup_steps")
        check_above_zero(self, "lr", "clip_norm", "adam_eps", "input_scale")
        check_above_zero(self, "decoder_init_norm", "giant")
        check_below(self, 1, "adam_b1", "adam_b2", "held_out")
        # They are int32 on the device.
        check_below(self, 2**31, "k", "steps", "dead_after_tokens")
        check_below(self, 2**31, "lr_warmup_steps", "lr_decay_start", "kl_warmup_steps")
        if self.held_out <= 0:
            raise UserError(f"--held_out={self.held_out} must lie between 0 and 1")
        both = self.k is not None and self.d_sae is not None
        if self.variant.endswith("topk") and both and self.k > self.d_sae:
            raise UserError(f"--k={self.k} must not exceed --d_sae={self.d_sae}")
        check_processes(self)
        for name in ("seed", "data_seed"):
            if getattr(self, name) >= 2**32:
                raise UserError(f"--{name}={getattr(self, name)} must be below 2^32")


# Which process this is: not written into the run's record.
PROCESS_FIELDS = frozenset("coordinator num_processes process_id".split())
# Changing one of these leaves the result of a run unchanged, so a resumed run may. What
# `bad_rows`, `giant` and `fork_from` did to a run is in its `data`.
RUNTIME_FIELDS = PROCESS_FIELDS | frozenset(
    "activations out arms feed mesh checkpoint_every log_every steps_per_dispatch "
    "tensorboard wandb verify bad_rows giant fork_from".split()
)


def resolve_train(config: TrainConfig, *, d_model: int) -> TrainConfig:
    """The config with every unset field filled: preset < variant < explicit value.

    Data-dependent defaults: `lr=auto`, `k_aux = d_model / 2`, warm-ups as shares of
    `steps` (learning rate 2 %, KL 10 %, decay from 80 %), `dead_after_tokens` as 5 %
    of the run's rows where the preset does not say.
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
            "lr_warmup_steps": config.steps // 50,
            "lr_decay_start": config.steps * 4 // 5,
            "kl_warmup_steps": config.steps // 10,
        },
    )


@dataclass(frozen=True)
class SAEConfig:
    """The static part of an autoencoder: shapes, family and switches that recompile.

    The numbers that may be traced (k, beta, learning rate, ...) are in
    `train.Hparams`; `k` here is their static upper bound and, in a trained run, k.
    """

    d_model: int
    d_sae: int
    sparsity: Literal["topk", "none"] = "topk"
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

    def __post_init__(self):
        if self.sparsity == "topk" and not 1 <= self.k <= self.d_sae:
            raise UserError(f"k={self.k} must lie between 1 and d_sae={self.d_sae}")


def sae_config(
    config: TrainConfig, *, d_model: int, dtype: Literal["float32", "bfloat16"]
) -> SAEConfig:
    """The static part of a resolved training config."""
    sparsity = VARIANTS[config.variant]["sparsity"]
    if sparsity == "topk" and config.k > config.d_sae:
        raise UserError(f"--k={config.k} must not exceed --d_sae={config.d_sae}")
    if config.k_aux > config.d_sae:
        raise UserError(f"--k_aux={config.k_aux} must not exceed d_sae={config.d_sae}")
    return SAEConfig(
        d_model=d_model,
        sparsity=sparsity,
        noise=config.noise_std > 0,
        auxk=config.auxk > 0,
        dtype=dtype,
        **{
            name: getattr(config, name)
            for name in (
                "d_sae k selection relu variance penalty kl_over k_aux auxk_units "
                "decoder_norm subtract_b_dec top_k"
            ).split()
        },
    )


@dataclass(frozen=True)
class EvalConfig:
    """Evaluates trained runs, or autoencoders in the files of another library, with the
    language model in the loop on held-out text."""

    run: str = flag(
        "run folder, a grid's folder, or a folder of any format that convert reads", ""
    )
    evals: str = flag(
        "comma list of core, sparse_probing, scr, tpp and absorption", "core"
    )
    model: str = flag("hub id or local folder; unset: the manifest's", "")
    revision: str = flag("hub revision; unset: the manifest's", "")
    layer: int | None = flag(
        "block whose output is autoencoded, from 0; unset: the folder's"
    )
    backend: Backend = flag("auto: jax for GPT-NeoX, else transformers", "auto")
    activations: str = flag("folder that extract wrote; unset: the run's", "")
    text: str = flag(
        "evaluate on this .jsonl, .txt or .parquet instead of held-out contexts", ""
    )
    text_column: str = flag("column of --text and --labelled with the text", "text")
    labelled: str = flag(
        "comma list of labelled .jsonl files, or of SAEBench's sets: ag_news, "
        "amazon_reviews, bias_in_bios, europarl, github-code",
        "",
    )
    label_column: str = flag(
        "column of --labelled with the label; a comma list is one for each set", "label"
    )
    attribute_column: str = flag(
        "column of --labelled with an attribute of two values, for scr; a comma list "
        "is one for each set",
        "",
    )
    train_size: int = flag("most texts to train a probe on", 4000)
    test_size: int = flag("most texts to test a probe on", 1000)
    seed: int = flag("of samples and probes", 42)
    saebench_compatible: bool = flag("SAEBench 0.6's numbers, bugs included", False)
    quirks: str = flag("comma list of single ones of those bugs (BUILD_NOTES.md)", "")
    saebench_json: bool = flag("also write files in SAEBench's own schema", False)
    num_tokens: int = flag("most tokens to evaluate on", 409_600)
    batch_size: int = flag("contexts in a forward pass", 16)

    def __post_init__(self):
        check_at_least(self, 1, "num_tokens", "batch_size")
        check_at_least(self, 0, "layer", "seed")
        check_at_least(self, 8, "train_size", "test_size")
        if not self.run:
            raise UserError("--run is not set; name a run folder or a grid's folder")


@dataclass(frozen=True)
class ConvertConfig:
    """Converts a trained autoencoder between a run folder and the files of SAELens,
    dictionary_learning, sparsify and OpenAI."""

    input: str = flag(
        "run folder, folder of another library (recognised by its files), or hub id", ""
    )
    to: Literal["saelens", "dictionary_learning", "sparsify", "openai", "vsae_jax"] = (
        flag("format to write", "saelens")
    )
    out: str = flag("new folder to write, with a model card, ready to upload", "")
    revision: str = flag("hub revision of --input: branch, tag or commit", "")
    activations: str = flag(
        "folder that extract wrote, for the self-check; unset: the run's, or generated",
        "",
    )
    rows: int = flag("rows of the self-check", 1024)
    push_to_hub: str = flag("hub id to upload --out to, such as me/my-sae", "")
    private: bool = flag("make the hub repository a private one", False)

    def __post_init__(self):
        check_at_least(self, 2, "rows")
        if not self.input or not self.out:
            raise UserError(
                "--input and --out must be set: a trained autoencoder and a new folder"
            )
