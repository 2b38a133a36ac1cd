"""Labelled texts: local `.jsonl` files, or SAEBench's own data sets by name."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vsae_jax.config import EvalConfig
from vsae_jax.evals import hub_sets
from vsae_jax.system.errors import UserError, one_line

_MOST_VALUES = 100


class TextSet(NamedTuple):
    """Texts with a label each, and where there is one an attribute.

    classes: the labels that are probed for, sorted. in_test: the rows of the set's own
    test split; None where it has none, and ours is drawn.
    """

    name: str
    texts: list[str]
    labels: np.ndarray
    attributes: np.ndarray | None
    classes: tuple[str, ...]
    in_test: np.ndarray | None


def read_sets(config: EvalConfig) -> list[TextSet]:
    """The sets that `--labelled` names, in its order."""
    names = [name.strip() for name in config.labelled.split(",")]
    if len(set(names)) != len(names):
        raise UserError(f"--labelled={config.labelled} names a set twice")
    labels = _per_set(config.label_column, len(names), "label_column")
    attributes = _per_set(config.attribute_column, len(names), "attribute_column")
    sets = []
    for name, label, attribute in zip(names, labels, attributes, strict=True):
        if name in hub_sets.SETS:
            found = hub_sets.read(name, rows=config.train_size + config.test_size)
            sets += [_text_set(*part) for part in found]
        else:
            rows = _jsonl(name, config.text_column, label, attribute)
            sets.append(_text_set(Path(name).stem, list(rows), (), None))
    repeated = [n for n, count in Counter(s.name for s in sets).items() if count > 1]
    if repeated:
        raise UserError(f"--labelled: two sets have the name {repeated[0]}; rename one")
    return sets


def _per_set(value: str, count: int, flag: str) -> list[str]:
    """One column for all sets, or one for each."""
    columns = [column.strip() for column in value.split(",")]
    if len(columns) not in (1, count):
        raise UserError(
            f"--{flag}={value} has {len(columns)} names for {count} sets; give one "
            "for all, or one for each (an empty one where a set has none)"
        )
    return columns * (count if len(columns) == 1 else 1)


def _text_set(
    name: str,
    rows: list[hub_sets.Row],
    classes: tuple[str, ...],
    in_test: np.ndarray | None,
) -> TextSet:
    labels = np.array([row.label for row in rows])
    found = sorted(set(labels.tolist()))
    if len(found) < 2:
        raise UserError(
            f"{name} has one label, {found[0]!r}; name the right --label_column"
        )
    if len(found) > _MOST_VALUES:
        raise UserError(
            f"{name} has {len(found)} different labels, such as {found[0]!r}; at most "
            f"{_MOST_VALUES} are probed for: name the right --label_column"
        )
    known = all(row.attribute is not None for row in rows)
    attributes = np.array([row.attribute for row in rows]) if known else None
    texts = [row.text for row in rows]
    return TextSet(name, texts, labels, attributes, classes or tuple(found), in_test)


def _jsonl(name: str, text: str, label: str, attribute: str) -> Iterator[hub_sets.Row]:
    path = Path(name).expanduser()
    if path.suffix.lower() != ".jsonl" or not path.is_file():
        known = ", ".join(hub_sets.SETS)
        raise UserError(f"--labelled={name} is no .jsonl file here and none of {known}")
    columns = {"text_column": text, "label_column": label}
    columns |= {"attribute_column": attribute} if attribute else {}
    empty = True
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            row = _object(line, f"{path}, line {number}")
            values = [
                _value(row, column, flag, f"{path}, line {number}")
                for flag, column in columns.items()
            ]
            if None not in values and values[0].strip():
                empty = False
                yield hub_sets.Row(*values)
    if empty:
        raise UserError(f"{path} holds no labelled text")


def _object(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not JSON: {one_line(error)}") from None
    if not isinstance(row, dict):
        raise UserError(f"{where} is not a JSON object")
    return row


def _value(row: dict[str, Any], column: str, flag: str, where: str) -> Any:
    """A column as text; None where it is null."""
    if column not in row:
        raise _no_column(flag, column, row, where)
    value = row[column]
    if value is None:
        return None
    is_text = flag == "text_column"
    if isinstance(value, list | dict) or (is_text and not isinstance(value, str)):
        raise UserError(
            f"{where}: --{flag}={column} is of type {type(value).__name__}, not "
            + ("text" if is_text else "a label")
        )
    # JSON can spell lone surrogates, which no tokenizer takes.
    return str(value).encode("utf-8", "replace").decode("utf-8")


def _no_column(flag: str, column: str, row: Iterable[str], where: str) -> UserError:
    there = ", ".join(sorted(row))
    return UserError(f"{where}: no --{flag}={column}; there is: {there}")
