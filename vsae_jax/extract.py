"""Text -> language model -> shards: `python -m vsae_jax.extract`.

Killed and started again it goes on; activations/extraction.py makes the shards.
"""

import contextlib
import dataclasses
import errno
import itertools
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from vsae_jax.activations import extraction, massive, text
from vsae_jax.activations.manifest import Manifest, read_manifest
from vsae_jax.activations.shards import Activations, ShardWriter, is_missing
from vsae_jax.activations.shared_shards import open_writer
from vsae_jax.activations.shuffle import read_ahead
from vsae_jax.config import ExtractConfig, cli, hook_name, resolve_extract
from vsae_jax.config.fields import difference
from vsae_jax.lm import (
    LanguageModel,
    check_layer,
    load_language_model,
    load_tokenizer,
)
from vsae_jax.lm.files import locate
from vsae_jax.lm.weights import weights_hash
from vsae_jax.system import locks, processes, progress, signals
from vsae_jax.system.errors import UserError

# Settings that a manifest can be compared in before any model is loaded; of the
# revision a manifest says both what was asked for and what was found.
_ASKED = {field.name for field in dataclasses.fields(ExtractConfig)} & {
    field.name for field in dataclasses.fields(Manifest)
} - {"revision"}


def command(configs: Sequence[ExtractConfig]) -> None:
    """Runs the command line's config."""
    with processes.joined(configs[0]):
        for config in configs:
            run(config)


def run(config: ExtractConfig) -> Activations:
    """The activations that `config` asks for; only what is missing is computed."""
    config = _absolute(resolve_extract(config))
    folder = Path(config.out)
    found = read_manifest(folder)
    if found is not None:
        _refuse_other(folder, found, asked(config))
        if config.verify:
            all_shards = set(range(len(found.shards)))
            there = sorted(all_shards.difference(_missing(folder, found)))
            Activations(folder, found).verify(there)
        if found.complete and not _missing(folder, found):
            print(
                f"{folder} is finished already: {found.n_contexts:,} contexts, "
                f"{found.n_rows:,} rows; nothing to do"
            )
            return Activations.open(folder)
    with locks.held(folder, doing="extract"):
        _extract(config, folder)
    return Activations.open(folder)


def _extract(config: ExtractConfig, folder: Path) -> None:
    """Computes what is missing in a folder that no other process writes."""
    found = read_manifest(folder)
    files = locate(config.model, revision=config.revision or None)
    corpus = text.documents(
        config.dataset, split=config.split, text_column=config.text_column
    )
    model = load_language_model(files, backend=config.backend, dtype=config.lm_dtype)
    manifest = new_manifest(config, model)
    check_layer(manifest.layer, n_layers=model.n_layers)
    _check_length(config, model)
    if found is not None:
        settings = _settings(manifest)
        if not found.weights_hash:
            del settings["weights_hash"]
        _refuse_other(folder, found, settings)
        manifest = found
    announce(folder, manifest)
    contexts = text.contexts(
        corpus,
        load_tokenizer(model.files),
        context_length=config.context_length,
        bos_id=model.bos_id,
        bos=manifest.bos,
    )
    began = time.monotonic()
    manifest = write_shards(
        folder, manifest, model, contexts, batch_size=config.batch_size
    )
    _conclude(folder, manifest, time.monotonic() - began)
    if processes.first():
        print(_massive(folder, model))


def _check_length(config: ExtractConfig, model: LanguageModel) -> None:
    if model.max_positions and config.context_length > model.max_positions:
        raise UserError(
            f"--context_length={config.context_length} must not exceed the "
            f"{model.max_positions} positions of --model={config.model}"
        )


def _absolute(config: ExtractConfig) -> ExtractConfig:
    """Local paths as seen from anywhere, for the manifest."""
    model = os.path.expanduser(config.model)
    dataset = os.path.expanduser(config.dataset)
    return dataclasses.replace(
        config,
        model=os.path.abspath(model) if os.path.isdir(model) else config.model,
        dataset=os.path.abspath(dataset) if os.path.isfile(dataset) else config.dataset,
    )


def asked(config: ExtractConfig) -> dict[str, Any]:
    """The part of a manifest that the flags decide."""
    values = {name: getattr(config, name) for name in _ASKED}
    if config.lm_dtype == "auto":  # decided when the model is read
        del values["lm_dtype"]
    return values | {"revision_asked": config.revision}


def new_manifest(config: ExtractConfig, model: LanguageModel) -> Manifest:
    """The manifest of a folder with no shard yet."""
    settings: dict[str, Any] = asked(config) | {"lm_dtype": model.dtype}
    return Manifest(
        **settings,
        revision=model.revision or "",
        config_hash=model.config_hash,
        tokenizer_hash=model.tokenizer_hash,
        weights_hash=weights_hash(model.files),
        hook_name=hook_name(settings["layer"]),
        d_model=model.d_model,
        vocab_size=model.vocab_size,
        bos_id=model.bos_id,
        special_ids=tuple(sorted(model.special_ids)),
    )


def _settings(manifest: Manifest) -> dict[str, Any]:
    """A manifest's fields but for those that grow with its shards."""
    grown = ("complete", "mean", "mean_squared_norm", "shards")
    names = (field.name for field in dataclasses.fields(manifest))
    return {name: getattr(manifest, name) for name in names if name not in grown}


def _refuse_other(folder: Path, found: Manifest, wanted: dict[str, Any]) -> None:
    old = {name: getattr(found, name) for name in wanted}
    if old.get("lm_dtype") == "":  # as it was before there was a choice
        old["lm_dtype"] = "float32"
    if changed := difference(old, wanted):
        raise UserError(
            f"{folder} was made with other settings ({changed}); give another --out, "
            "or delete it"
        )


def _missing(folder: Path, manifest: Manifest) -> list[int]:
    """The shards that the manifest lists and that are not in the folder."""
    return [i for i in range(len(manifest.shards)) if is_missing(folder, i)]


def announce(folder: Path, manifest: Manifest) -> None:
    """Prints what will be written and what it needs; refuses if the disk is too
    small."""
    m, contexts = manifest, _most_contexts(manifest)
    n_rows = contexts * m.rows_per_context
    n_bytes = n_rows * m.row_bytes + contexts * m.context_length * 4
    there = len(m.shards) - len(_missing(folder, m))
    print(
        f"model   {m.model}, {m.hook_name}, d_model {m.d_model}\n"
        f"text    {m.dataset}, contexts of {m.context_length} tokens, bos {m.bos}, "
        f"rows of the positions from {m.dropped_positions}\n"
        f"writes  up to {contexts:,} contexts, {n_rows:,} rows of {m.dtype}, "
        f"{progress.size(n_bytes)}, to {folder} ({progress.size(_free(folder))} free)"
    )
    if there:
        print(f"resumes: {there} shards of {m.shard_contexts} contexts are there")
    n_bytes -= there * m.shard_contexts * m.rows_per_context * m.row_bytes
    if n_bytes > _free(folder):
        raise UserError(
            f"{folder} needs {progress.size(n_bytes)} and its disk has "
            f"{progress.size(_free(folder))} free; lower --num_tokens or give --out= "
            "on another disk"
        )


def _most_contexts(manifest: Manifest) -> int:
    """The number of contexts asked for, or the most that a local text file can hold."""
    m = manifest
    contexts = m.num_tokens // m.context_length
    if contexts == 0:
        raise UserError(
            f"--num_tokens={m.num_tokens} is less than one context of "
            f"--context_length={m.context_length}"
        )
    most = text.most_tokens(m.dataset)
    room = max(m.context_length - (m.bos != "none"), 1)
    return contexts if most is None else min(contexts, most // room)


def _free(folder: Path) -> int:
    """Free bytes on the disk where the folder is or will be."""
    folder = folder.absolute()
    existing = next(p for p in (folder, *folder.parents) if p.exists())
    return shutil.disk_usage(existing).free


def _conclude(folder: Path, manifest: Manifest, seconds: float) -> None:
    m, n_tokens = manifest, manifest.n_contexts * manifest.context_length
    if m.n_contexts < m.num_tokens // m.context_length:
        print(
            f"note: the corpus ends after {n_tokens:,} tokens, before "
            f"--num_tokens={m.num_tokens:,}; all of it was taken"
        )
    norm = m.mean_squared_norm**0.5
    print(
        f"wrote {m.n_contexts:,} contexts, {m.n_rows:,} rows to {folder} in "
        f"{seconds:.1f} s; root mean square norm of a row: {norm:.4g}"
    )


def _massive(folder: Path, model: LanguageModel) -> str:
    """What `massive` found in a sample of the rows, with tokens by their text."""
    tokenizer = load_tokenizer(model.files)
    found = massive.look(*massive.sample(Activations.open(folder)))
    return massive.described(found, lambda token: str(tokenizer.decode([token])))


def write_shards(
    folder: Path,
    manifest: Manifest,
    model: LanguageModel,
    contexts: Iterator[Int[np.ndarray, " context_length"]],
    *,
    batch_size: int,
) -> Manifest:
    """Writes every shard that is not there yet; the finished manifest."""
    m = manifest
    total = m.n_contexts if m.complete else m.num_tokens // m.context_length
    blocks = extraction.blocks(contexts, total=total, size=m.shard_contexts)
    first = next(blocks)
    with signals.caught() as caught:
        writer = open_writer(folder, manifest)
        shards = read_ahead(itertools.chain([first], blocks), depth=1)
        pieces = extraction.pieces(shards, writer, model, batch_size=batch_size)
        try:
            with contextlib.closing(shards):
                extraction.write(writer, pieces, caught, bar=_bar(folder, manifest))
        except OSError as error:
            raise _more_room(error, writer) from None
        finally:
            writer.abandon()
    return writer.manifest


def _bar(folder: Path, manifest: Manifest) -> progress.Bar | progress.Lines:
    """Counts tokens, of this process, from those whose shards are there."""
    m, n = manifest, processes.count()
    there = m.n_contexts - sum(m.shards[i].contexts for i in _missing(folder, m))
    total = _most_contexts(m) * m.context_length
    return progress.bar(
        total // n,
        unit="tokens",
        start=there * m.context_length // n,
        stream=processes.progress_stream(),
    )


def _more_room(error: OSError, writer: ShardWriter) -> Exception:
    """What to say of a disk that fills up; any other error as it is."""
    if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return error
    return UserError(
        f"writing {error.filename} failed ({error.strerror}); "
        f"{len(writer.manifest.shards)} shards are safe in {writer.folder}: make room "
        "and run the same command to go on"
    )


if __name__ == "__main__":
    cli.main(command, ExtractConfig)
