"""What `extract` can be asked."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from vsae_jax.config.fields import check_at_least, fill, flag
from vsae_jax.config.presets import EXTRACT_PRESETS, Preset, preset_flag
from vsae_jax.config.processes import PROCESS_FLAGS, check_processes
from vsae_jax.config.sites import Hook, Site
from vsae_jax.system.errors import UserError

Backend = Literal["transformers", "jax", "auto"]
LMDtype = Literal["auto", "float32", "bfloat16"]
LM_DTYPE = (
    "dtype of the language model's products; auto: bfloat16 on a GPU, and on a CPU "
    "that is fast at it for a model at least 512 wide that is stored in it"
)

DEVICE = (
    "torch's device, with --backend=transformers: cpu, cuda, cuda:1 or mps; auto: the "
    "first GPU, or the CPU"
)


@dataclass(frozen=True)
class ExtractConfig:
    """Runs a language model over text once and writes its activations, of one or of
    several layers and sites, to memory-mapped NumPy shards.

    python -m vsae_jax.extract --model=gpt2 --backend=jax --layer=5 --dataset=my.jsonl
    """

    preset: Preset = flag("whose settings to use where a flag is unset", "paper")
    model: str = flag("hub id or local folder", "EleutherAI/pythia-70m-deduped")
    revision: str = flag("hub revision: branch, tag or commit", "")
    backend: Backend = flag(
        "transformers needs torch; auto: jax where it runs the family", "transformers"
    )
    lm_dtype: LMDtype = flag(LM_DTYPE, "auto")
    device: str = flag(DEVICE, "auto", runtime=True)
    layer: int = preset_flag(
        "block whose activations are kept, from 0", table="extract", grid=True
    )
    site: Site = flag(
        "where in the block: the residual stream after it, or what its MLP or its "
        "attention adds to the stream",
        "resid_post",
        grid=True,
    )
    dataset: str = flag(
        "hub id, or a local .jsonl, .txt or .parquet", "roneneldan/TinyStories"
    )
    split: str = flag("split of a hub data set", "train")
    text_column: str = flag("column that holds the text", "text")
    num_tokens: int = preset_flag("tokens to run through the model", table="extract")
    context_length: int = flag("tokens in a context, BOS included", 128)
    bos: Literal["keep", "drop", "none"] = preset_flag(
        "every context starts with BOS: keep its row, drop its row, or add no BOS",
        table="extract",
    )
    skip_positions: int = flag(
        "first text positions of a context, after BOS, whose rows are dropped", 0
    )
    center_residual: bool = preset_flag(
        "subtract each row's mean over d_model, as TransformerLens does",
        table="extract",
    )
    dtype: Literal["bfloat16", "float16", "float32"] = flag(
        "dtype of the rows on disk", "bfloat16"
    )
    coordinator: str = flag(PROCESS_FLAGS["coordinator"], "", runtime=True)
    num_processes: int | None = flag(PROCESS_FLAGS["num_processes"], runtime=True)
    process_id: int | None = flag(PROCESS_FLAGS["process_id"], runtime=True)
    batch_size: int = flag("contexts in a forward pass", 32)
    shard_contexts: int = flag("contexts in a shard", 2048)
    verify: bool = flag("read existing shards and compare their checksums", False)
    out: str = flag(
        "folder for the shards, or with several layers or sites for a folder of each, "
        "such as blocks.3.hook_mlp_out; unset: activations/<model>/blocks.<layer>"
        ".hook_<site>",
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

    @property
    def hook(self) -> Hook:
        """Where in the model."""
        return Hook(self.layer, self.site)


def resolve_extract(config: ExtractConfig) -> ExtractConfig:
    """The config with every unset field filled from its preset."""
    config = fill(config, EXTRACT_PRESETS[config.preset])
    if config.out:
        return config
    out = default_activations(config.model, config.hook)
    return dataclasses.replace(config, out=out)


def resolve_extracts(configs: Sequence[ExtractConfig]) -> list[ExtractConfig]:
    """Every config resolved; of several, which differ in layer and site alone, each
    writes to a folder of its own in `--out`."""
    if len(configs) == 1:
        return [resolve_extract(configs[0])]
    resolved = [resolve_extract(config) for config in configs]
    return [
        dataclasses.replace(r, out=str(Path(c.out) / r.hook.name)) if c.out else r
        for c, r in zip(configs, resolved, strict=True)
    ]


def default_activations(model: str, hook: Hook) -> str:
    """Where `extract` writes and `train` reads when neither is told."""
    name = model.rstrip("/").rsplit("/", 1)[-1]
    return f"activations/{name}/{hook.name}"
