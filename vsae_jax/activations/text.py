"""Corpus -> documents -> contexts of token ids."""

import itertools
import json
import mmap
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Int

from vsae_jax.lm.files import HUB_TIMEOUT_S, connection_errors
from vsae_jax.lm.tokenizer import encode
from vsae_jax.system.errors import UserError, one_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DOCUMENT_BORDER = "<|endoftext|>"
DOCUMENTS_AT_ONCE = 256
_SUFFIXES = ".jsonl, .txt or .parquet"
_WAYS_ON = (
    f"give --dataset= a local {_SUFFIXES} file, or run the offline demo: "
    "python -m vsae_jax.demo"
)


def documents(
    dataset: str, *, split: str = "train", text_column: str = "text"
) -> Iterator[str]:
    """The texts of a corpus, in its order; empty ones are left out.

    Args:
      dataset: a local file, or the id of a hub data set, which is streamed.
        `.jsonl`: one object per line. `.parquet`: one document per row. `.txt`:
        documents are separated by lines with only `<|endoftext|>`, or where there are
        no such lines, by blank lines.
      split: of a hub data set.
      text_column: key or column that holds the text; not for `.txt`.

    Raises UserError at once for a data set that is not there, and while iterating
    for one that is malformed or empty.
    """
    path = Path(dataset).expanduser()
    reader = _READERS.get(path.suffix.lower())
    if reader is not None:
        if not path.is_file():
            raise UserError(f"--dataset={dataset}: there is no such file")
        return _non_empty(reader(path, text_column), dataset)
    if path.exists() or dataset.startswith((".", "/", "~")) or not dataset:
        raise UserError(f"--dataset={dataset} is not a {_SUFFIXES} file")
    stream = _open_on_hub(dataset, split)
    return _non_empty(_from_hub(stream, text_column, dataset), dataset)


def _non_empty(texts: Iterator[str], dataset: str) -> Iterator[str]:
    empty = True
    for text in texts:
        if text and not text.isspace():
            empty = False
            yield text
    if empty:
        raise UserError(f"--dataset={dataset} holds no text")


def most_tokens(dataset: str) -> int | None:
    """An upper bound on the number of tokens in the corpus; None where it is unknown.

    A token stands for at least one byte; the separator between two documents stands for
    the bytes that separate them in the file.
    """
    path = Path(dataset).expanduser()
    known = path.suffix.lower() in (".jsonl", ".txt") and path.is_file()
    return path.stat().st_size + 1 if known else None


def json_rows(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """The objects in a `.jsonl` file, each with a description of its place."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{where} is not JSON: {one_line(error)}") from None
            if not isinstance(row, dict):
                raise UserError(f"{where} is not a JSON object")
            yield row, where


def _jsonl(path: Path, column: str) -> Iterator[str]:
    for row, where in json_rows(path):
        yield _text_of(row, column, where)


def _text_of(row: dict[str, Any], column: str, where: str) -> str:
    if column not in row:
        raise no_column("text_column", column, row, where)
    text = row[column]
    if text is None:
        return ""
    if not isinstance(text, str):
        raise UserError(
            f"{where}: {column!r} is of type {type(text).__name__} and not text"
        )
    # JSON can spell lone surrogates, which no tokenizer takes.
    return text.encode("utf-8", "replace").decode("utf-8")


def no_column(flag: str, column: str, columns: Iterable[str], where: str) -> UserError:
    """The error for a column that a flag names and that is not there."""
    there = ", ".join(sorted(map(str, columns)))
    return UserError(f"{where}: no --{flag}={column}; there is: {there}")


def _txt(path: Path, _column: str) -> Iterator[str]:
    marked = _has_border(path)
    lines: list[str] = []
    try:
        with path.open(encoding="utf-8-sig") as file:
            for line in file:
                border = line.strip() == (DOCUMENT_BORDER if marked else "")
                if not border:
                    lines.append(line)
                elif lines:
                    yield "".join(lines).strip("\n")
                    lines = []
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {one_line(error)}") from None
    yield "".join(lines).strip("\n")


def _has_border(path: Path) -> bool:
    if path.stat().st_size == 0:
        return False
    line = rb"(?m)^[ \t]*" + re.escape(DOCUMENT_BORDER.encode()) + rb"[ \t]*\r?$"
    with (
        path.open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
    ):
        return re.search(line, data) is not None


def _parquet(path: Path, column: str) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            if column not in file.schema_arrow.names:
                names = file.schema_arrow.names
                raise no_column("text_column", column, names, str(path))
            for batch in file.iter_batches(columns=[column], batch_size=1024):
                for row in batch.to_pylist():
                    yield _text_of(row, column, str(path))
    except pyarrow.ArrowException as error:
        raise UserError(f"{path} is not a parquet file: {one_line(error)}") from None


_READERS: dict[str, Callable[[Path, str], Iterator[str]]] = {
    ".jsonl": _jsonl,
    ".txt": _txt,
    ".parquet": _parquet,
}


def _from_hub(
    stream: Iterable[dict[str, Any]], column: str, dataset: str
) -> Iterator[str]:
    try:
        for number, row in enumerate(stream):
            yield _text_of(row, column, f"--dataset={dataset}, row {number}")
    except connection_errors() as error:
        raise UserError(
            f"reading --dataset={dataset} broke off ({one_line(error)}); the same "
            "command goes on from the last shard"
        ) from None


def _open_on_hub(dataset: str, split: str) -> Iterable[dict[str, Any]]:
    """The rows of a hub data set as a stream; the hub is asked once, not again."""
    from huggingface_hub import dataset_info, errors

    try:
        dataset_info(dataset, timeout=HUB_TIMEOUT_S)
    except (errors.HFValidationError, errors.RepositoryNotFoundError):
        raise UserError(
            f"--dataset={dataset} is neither a file here nor a data set that the hub "
            f"shows you (a private one needs `hf auth login`); {_WAYS_ON}"
        ) from None
    except connection_errors() as error:
        raise UserError(
            f"--dataset={dataset} is not a file here and the hub cannot be reached "
            f"({one_line(error)}); {_WAYS_ON}"
        ) from None
    import datasets

    try:
        return datasets.load_dataset(dataset, split=split, streaming=True)
    except (ValueError, RuntimeError, OSError) as error:
        raise UserError(
            f"--dataset={dataset} --split={split} cannot be read: {one_line(error)}"
        ) from None


def contexts(
    documents: Iterable[str],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    context_length: int,
    bos_id: int,
    bos: str,
) -> Iterator[Int[np.ndarray, " context_length"]]:
    """Packs documents into contexts of int32 ids, the way SAELens does.

    Documents are tokenised without special tokens and joined by one `bos_id`; text
    that spells a special token, such as "<|endoftext|>", stays text. Unless `bos` is
    none, every context starts with `bos_id`, also where it continues a document that
    the context before it cut. A document at the start of a context has no separator
    before it. The last context is left out if it is not full. `bos` is keep, drop or
    none; keep and drop differ only in the rows that are stored later.
    """
    start = np.full(0 if bos == "none" else 1, bos_id, np.int32)
    room = context_length - len(start)
    if room < 1:
        raise UserError(f"--context_length={context_length} leaves no room after BOS")
    separator = np.full(1, bos_id, np.int32)
    row, n_tokens, n_contexts = np.empty(0, np.int32), 0, 0
    for ids in _token_ids(documents, tokenizer):
        row = np.concatenate([row, separator[: len(row)], ids])
        n_tokens += len(ids)
        full = len(row) // room * room
        for text in row[:full].reshape(-1, room):
            yield np.concatenate([start, text])
            n_contexts += 1
        row = row[full:]
    if n_contexts == 0:
        raise UserError(
            f"the corpus is too short: {n_tokens} tokens, and one context of "
            f"--context_length={context_length} needs {room}"
        )


def _token_ids(
    documents: Iterable[str], tokenizer: "PreTrainedTokenizerBase"
) -> Iterator[Int[np.ndarray, " tokens"]]:
    documents = iter(documents)
    while batch := list(itertools.islice(documents, DOCUMENTS_AT_ONCE)):
        for ids in encode(batch, tokenizer):
            if ids:
                yield np.array(ids, np.int32)
