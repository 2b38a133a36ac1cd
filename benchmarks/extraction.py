"""Extraction against the bare forward pass: `python -m benchmarks.extraction`.

In turns: the model's residual stream of tokens that lie in memory, batch after batch;
and all that `extract` does from text to synced, checksummed shards, with the same
model, tokens, layer and batch size. Loading and compiling are outside both.

With `--together`: extracting all of `--layer` and `--site` in one pass, and the stream
after the last of these blocks alone.
"""

import contextlib
import dataclasses
import importlib.util
import io
import itertools
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import numpy as np
from jaxtyping import Int

from vsae_jax import extract
from vsae_jax.activations import text
from vsae_jax.config import ExtractConfig, Hook, Site, cli, resolve_extract
from vsae_jax.config.fields import check_at_least, flag
from vsae_jax.lm import LanguageModel, load_language_model, load_tokenizer

_COLUMNS = "{:14}{:>6}{:>7}{:>14}{:>14}{:>8}  {}"


@dataclass(frozen=True)
class ExtractionConfig:
    """Measures the tokens/s of `extract` beside those of the bare forward pass."""

    model: str = flag("hub id or local folder", "EleutherAI/pythia-70m-deduped")
    dataset: str = flag(
        "hub id, or a local .jsonl, .txt or .parquet", "roneneldan/TinyStories"
    )
    num_tokens: int = flag("tokens in a turn", 262_144)
    backend: Literal["all", "jax", "transformers"] = flag(
        "all: jax, and transformers where torch is installed", "all"
    )
    layer: int = flag("block whose activations are kept, from 0", 0, grid=True)
    site: Site = flag("which of them", "resid_post", grid=True)
    together: bool = flag("all layers and sites in one pass, beside the last", False)
    batch_size: int = flag("contexts in a forward pass", 32, grid=True)
    context_length: int = flag("tokens in a context", 128)
    dtype: Literal["bfloat16", "float16", "float32"] = flag(
        "of the rows on disk", "bfloat16"
    )
    rounds: int = flag("turns of each", 5)
    scratch: str = flag("where shards are written for the time of a turn", "")

    def __post_init__(self):
        check_at_least(self, 0, "layer")
        check_at_least(self, 1, "batch_size", "context_length", "rounds")
        check_at_least(self, self.context_length, "num_tokens")


class Turn(NamedTuple):
    """Tokens per second of both in one round."""

    bare: float
    extract: float


def command(configs: Sequence[ExtractionConfig]) -> None:
    """A row of the table for every backend and config, or for all configs together."""
    together = configs[0].together
    first, second = ("last", "all") if together else ("bare", "extract")
    titles = "backend", "layer", "batch", f"{first} tok/s", f"{second} tok/s", "ratio"
    print(_COLUMNS.format(*titles, "least to most"))
    last = dataclasses.replace(max(configs, key=lambda c: c.layer), site="resid_post")
    for backend in _backends(configs[0].backend):
        model = load_language_model(configs[0].model, backend=backend)
        for config in configs:
            model.check(Hook(config.layer, config.site))
        if together:
            print(_row(backend, last, measure_together(configs, last, model)))
            continue
        for config in configs:
            print(_row(backend, config, measure(config, model)), flush=True)


def _backends(asked: str) -> list[Literal["jax", "transformers"]]:
    if asked == "jax":
        return ["jax"]
    if asked == "transformers":
        return ["transformers"]
    torch = importlib.util.find_spec("torch") is not None
    return ["jax", "transformers"] if torch else ["jax"]


def measure(config: ExtractionConfig, model: LanguageModel) -> list[Turn]:
    """`rounds` turns, after one of each that warms up."""
    tokenizer = load_tokenizer(config.model, revision=model.revision)
    tokens = np.stack(list(_contexts(config, model, tokenizer)))

    def turn() -> Turn:
        return Turn(
            tokens.size / _bare(config, model, tokens),
            tokens.size / _extract([config], model, tokenizer, tokens.size),
        )

    turn()
    return [turn() for _ in range(config.rounds)]


def measure_together(
    configs: Sequence[ExtractionConfig], last: ExtractionConfig, model: LanguageModel
) -> list[Turn]:
    """`rounds` turns: `last` alone, and all configs in one pass."""
    tokenizer, n = load_tokenizer(last.model, revision=model.revision), last.num_tokens

    def turn() -> Turn:
        alone, all_of_them = (
            n / _extract(some, model, tokenizer, n) for some in ([last], configs)
        )
        return Turn(alone, all_of_them)

    turn()
    return [turn() for _ in range(last.rounds)]


def _contexts(config: ExtractionConfig, model: LanguageModel, tokenizer):
    contexts = text.contexts(
        text.documents(config.dataset),
        tokenizer,
        context_length=config.context_length,
        bos_id=model.bos_id,
        bos="drop",
    )
    return itertools.islice(contexts, config.num_tokens // config.context_length)


def _bare(
    config: ExtractionConfig,
    model: LanguageModel,
    tokens: Int[np.ndarray, "contexts context_length"],
) -> float:
    """Seconds of the forward pass alone."""
    size = config.batch_size
    padded = np.pad(tokens, ((0, -len(tokens) % size), (0, 0)))
    began = time.perf_counter()
    for start in range(0, len(padded), size):
        hook = Hook(config.layer, config.site)
        (found,) = model.at(padded[start : start + size], [hook])
    jax.block_until_ready(found)
    return time.perf_counter() - began


def _extract(
    configs: Sequence[ExtractionConfig],
    model: LanguageModel,
    tokenizer,
    num_tokens: int,
) -> float:
    """Seconds from text to finished shards, of all configs in one pass."""
    config = configs[0]
    with (
        tempfile.TemporaryDirectory(dir=config.scratch or None) as scratch,
        contextlib.redirect_stderr(io.StringIO()),
    ):
        folders = []
        for each in configs:
            asked = ExtractConfig(
                model=each.model,
                dataset=each.dataset,
                layer=each.layer,
                site=each.site,
                num_tokens=num_tokens,
                context_length=each.context_length,
                dtype=each.dtype,
                batch_size=each.batch_size,
            )
            path = Path(scratch) / asked.hook.name
            path.mkdir()
            manifest = extract.new_manifest(resolve_extract(asked), model)
            folders.append(extract.Folder(path, manifest))
        began = time.perf_counter()
        extract.write_shards(
            folders,
            model,
            _contexts(config, model, tokenizer),
            batch_size=config.batch_size,
        )
        return time.perf_counter() - began


def _row(backend: str, config: ExtractionConfig, turns: Sequence[Turn]) -> str:
    ratios = [turn.extract / turn.bare for turn in turns]
    return _COLUMNS.format(
        backend,
        config.layer,
        config.batch_size,
        f"{statistics.median(turn.bare for turn in turns):,.0f}",
        f"{statistics.median(turn.extract for turn in turns):,.0f}",
        f"{statistics.median(ratios):.3f}",
        f"{min(ratios):.3f} to {max(ratios):.3f}",
    )


if __name__ == "__main__":
    cli.main(command, ExtractionConfig)
