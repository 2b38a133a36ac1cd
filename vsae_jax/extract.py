"""Text -> language model -> shards: `python -m vsae_jax.extract`.

If it is killed and started again, it goes on. activations/extraction.py makes the
shards.
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
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from vsae_jax.activations import extraction, massive, text
from vsae_jax.activations.manifest import Manifest, read_manifest
from vsae_jax.activations.shards import Activations, ShardWriter, is_missing
from vsae_jax.activations.shared_shards import open_writer
from vsae_jax.activations.shuffle import read_ahead
from vsae_jax.config import ExtractConfig, cli, resolve_extracts
from vsae_jax.config.fields import difference
from vsae_jax.lm import (
    LanguageModel,
    leave_room,
    load_language_model,
    load_tokenizer,
)
from vsae_jax.lm.files import locate
from vsae_jax.lm.weights import weights_hash
from vsae_jax.system import locks, processes, progress, signals
from vsae_jax.system.errors import UserError

# The settings in which a manifest can be compared before any model is loaded. Without
# the revision, of which a manifest holds both what was asked for and what was found.
_ASKED = {field.name for field in dataclasses.fields(ExtractConfig)} & {
    field.name for field in dataclasses.fields(Manifest)
} - {"revision"}


class Folder(NamedTuple):
    """A folder to write, and its manifest, which may list shards already."""

    path: Path
    manifest: Manifest


def command(configs: Sequence[ExtractConfig]) -> None:
    """Runs the command line's configs in one pass."""
    with processes.joined(configs[0]):
        run_together(configs)


def run(config: ExtractConfig) -> Activations:
    """The activations that `config` asks for; only what is missing is computed."""
    return run_together([config])[0]


def run_together(configs: Sequence[ExtractConfig]) -> list[Activations]:
    """The activations of each config, from one pass over the text; the configs differ
    only in layer and site."""
    configs = [_absolute(config) for config in resolve_extracts(configs)]
    done = [_is_finished(config) for config in configs]
    for config, finished in zip(configs, done, strict=True):
        if finished:
            there = Activations.open(config.out)
            print(
                f"{config.out} is finished already: {there.n_contexts:,} contexts, "
                f"{there.n_rows:,} rows; nothing to do"
            )
    if not all(done):
        # Before the locks, which start JAX by asking it which process this is.
        leave_room(backend=configs[0].backend, device=configs[0].device)
        with contextlib.ExitStack() as stack:
            for config in configs:
                stack.enter_context(locks.held(Path(config.out), doing="extract"))
            _extract(configs)
    return [Activations.open(config.out) for config in configs]


def _is_finished(config: ExtractConfig) -> bool:
    """Whether nothing is missing in a config's folder. Refuses a folder that was made
    with other settings and, with `--verify`, one with a damaged shard."""
    folder = Path(config.out)
    found = read_manifest(folder)
    if found is None:
        return False
    _refuse_other(folder, found, asked(config))
    if config.verify:
        all_shards = set(range(len(found.shards)))
        there = sorted(all_shards.difference(_missing(folder, found)))
        Activations(folder, found).verify(there)
    return found.complete and not _missing(folder, found)


def _extract(configs: Sequence[ExtractConfig]) -> None:
    """Computes what is missing in folders that are locked."""
    config = configs[0]
    files = locate(config.model, revision=config.revision or None)
    corpus = text.documents(
        config.dataset, split=config.split, text_column=config.text_column
    )
    model = load_language_model(
        files, backend=config.backend, dtype=config.lm_dtype, device=config.device
    )
    for each in configs:
        model.check(each.hook)
    if model.max_positions and config.context_length > model.max_positions:
        raise UserError(
            f"--context_length={config.context_length} must not exceed the "
            f"{model.max_positions} positions of --model={config.model}"
        )
    folders = [_folder(each, model) for each in configs]
    announce(folders)
    contexts = text.contexts(
        corpus,
        load_tokenizer(model.files),
        context_length=config.context_length,
        bos_id=model.bos_id,
        bos=folders[0].manifest.bos,
    )
    began = time.monotonic()
    folders = write_shards(folders, model, contexts, batch_size=config.batch_size)
    for folder in folders:
        _conclude(folder.path, folder.manifest, time.monotonic() - began)
        if processes.first():
            print(_massive(folder.path, model))


def _folder(config: ExtractConfig, model: LanguageModel) -> Folder:
    """A config's folder; refuses one that was made with another model."""
    path, new = Path(config.out), new_manifest(config, model)
    found = read_manifest(path)
    if found is None:
        return Folder(path, new)
    settings = _settings(new)
    if not found.weights_hash:
        del settings["weights_hash"]
    _refuse_other(path, found, settings)
    return Folder(path, found)


def _absolute(config: ExtractConfig) -> ExtractConfig:
    """The config with absolute local paths, for the manifest."""
    model = os.path.expanduser(config.model)
    dataset = os.path.expanduser(config.dataset)
    return dataclasses.replace(
        config,
        model=os.path.abspath(model) if os.path.isdir(model) else config.model,
        dataset=os.path.abspath(dataset) if os.path.isfile(dataset) else config.dataset,
    )


def asked(config: ExtractConfig) -> dict[str, Any]:
    """The fields of a manifest that the flags decide."""
    values = {name: getattr(config, name) for name in _ASKED}
    values["site"] = config.site
    if config.lm_dtype == "auto":  # decided when the model is read
        del values["lm_dtype"]
    return values | {"revision_asked": config.revision}


def new_manifest(config: ExtractConfig, model: LanguageModel) -> Manifest:
    """The manifest of a folder with no shard yet."""
    settings: dict[str, Any] = asked(config) | {"lm_dtype": model.dtype}
    del settings["site"]
    return Manifest(
        **settings,
        revision=model.revision or "",
        config_hash=model.config_hash,
        tokenizer_hash=model.tokenizer_hash,
        weights_hash=weights_hash(model.files),
        hook_name=config.hook.name,
        d_model=model.d_model,
        vocab_size=model.vocab_size,
        bos_id=model.bos_id,
        special_ids=tuple(sorted(model.special_ids)),
    )


def _settings(manifest: Manifest) -> dict[str, Any]:
    """A manifest's fields, except for those that change with its shards."""
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
    """The shards that the manifest lists and the folder lacks."""
    return [i for i in range(len(manifest.shards)) if is_missing(folder, i)]


def announce(folders: Sequence[Folder]) -> None:
    """Prints what will be written and how large it is; refuses a disk that is full."""
    m, contexts = folders[0].manifest, _most_contexts(folders[0].manifest)
    n_rows = contexts * m.rows_per_context
    n_bytes = n_rows * m.row_bytes + contexts * m.context_length * 4
    there = [len(f.manifest.shards) - len(_missing(*f)) for f in folders]
    hooks = ", ".join(f.manifest.hook_name for f in folders)
    where = ", ".join(str(f.path) for f in folders)
    free = _free(folders[0].path)
    each, every = ("", "") if len(folders) == 1 else (" each", " in every folder")
    print(
        f"model   {m.model}, {hooks}, d_model {m.d_model}\n"
        f"text    {m.dataset}, contexts of {m.context_length} tokens, bos {m.bos}, "
        f"rows of the positions from {m.dropped_positions}\n"
        f"writes  up to {contexts:,} contexts, {n_rows:,} rows of {m.dtype}, "
        f"{progress.size(n_bytes)}{each}, to {where} ({progress.size(free)} free)"
    )
    if least := min(there):
        print(
            f"resumes: {least} shards of {m.shard_contexts} contexts are there{every}"
        )
    shard_bytes = m.shard_contexts * m.rows_per_context * m.row_bytes
    n_bytes = n_bytes * len(folders) - sum(there) * shard_bytes
    if n_bytes > free:
        raise UserError(
            f"{where} needs {progress.size(n_bytes)} and its disk has "
            f"{progress.size(free)} free; lower --num_tokens or give --out= on another "
            "disk"
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
    """What `massive` finds in a sample of the rows, with the tokens' texts."""
    tokenizer = load_tokenizer(model.files)
    found = massive.look(*massive.sample(Activations.open(folder)))
    return massive.described(found, lambda token: str(tokenizer.decode([token])))


def write_shards(
    folders: Sequence[Folder],
    model: LanguageModel,
    contexts: Iterator[Int[np.ndarray, " context_length"]],
    *,
    batch_size: int,
) -> list[Folder]:
    """Writes every missing shard of all folders in one pass; returns the finished
    folders."""
    m = folders[0].manifest
    total = m.num_tokens // m.context_length
    total = next((f.manifest.n_contexts for f in folders if f.manifest.complete), total)
    blocks = extraction.blocks(contexts, total=total, size=m.shard_contexts)
    first = next(blocks)
    with signals.caught() as caught:
        writers = [open_writer(*folder) for folder in folders]
        shards = read_ahead(itertools.chain([first], blocks), depth=1)
        pieces = extraction.pieces(shards, writers, model, batch_size=batch_size)
        try:
            with contextlib.closing(shards):
                extraction.write(writers, pieces, caught, bar=_bar(folders))
        except OSError as error:
            raise _more_room(error, writers) from None
        finally:
            for writer in writers:
                writer.abandon()
    return [Folder(writer.folder, writer.manifest) for writer in writers]


def _bar(folders: Sequence[Folder]) -> progress.Bar | progress.Lines:
    """A progress bar of this process's tokens, starting at those whose shards are in
    every folder already."""
    m, n = folders[0].manifest, processes.count()
    there = min(
        f.manifest.n_contexts - sum(f.manifest.shards[i].contexts for i in _missing(*f))
        for f in folders
    )
    return progress.bar(
        _most_contexts(m) * m.context_length // n,
        unit="tokens",
        start=there * m.context_length // n,
    )


def _more_room(error: OSError, writers: Sequence[ShardWriter]) -> Exception:
    """The error to raise: a UserError for a full disk, any other error as it is."""
    if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return error
    return UserError(
        f"writing {error.filename} failed ({error.strerror}); "
        f"{extraction.safe(writers)}: make room and run the same command to go on"
    )


if __name__ == "__main__":
    cli.main(command, ExtractConfig)
