"""Labelled texts: local `.jsonl` files, or SAEBench's own data sets by name."""

import math
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vsae_jax.activations.text import json_rows, no_column
from vsae_jax.config import EvalConfig
from vsae_jax.evals import hub_sets
from vsae_jax.system.errors import UserError

_MOST_VALUES = 100
# How a note describes rows that lack a value, by the flag that names the column.
_MISSING = {
    "text_column": "without a text",
    "label_column": "without a label (null, empty, NaN or infinite)",
    "attribute_column": "without an attribute (null, empty, NaN or infinite)",
}


class TextSet(NamedTuple):
    """Texts, each with a label and maybe an attribute.

    classes: the labels that are probed for, sorted. in_test: the mask of the set's own
    test split; None where it has none, and one is drawn. notes: what was left out.
    """

    name: str
    texts: list[str]
    labels: np.ndarray
    attributes: np.ndarray | None
    classes: tuple[str, ...]
    in_test: np.ndarray | None
    notes: tuple[str, ...] = ()


def read_sets(config: EvalConfig) -> list[TextSet]:
    """The sets that `--labelled` names, in its order. A file that is there twice, for
    two columns of labels, has the column in its name."""
    names = [name.strip() for name in config.labelled.split(",")]
    labels = _per_set(config.label_column, len(names), "label_column")
    attributes = _per_set(config.attribute_column, len(names), "attribute_column")
    if len(set(zip(names, labels, strict=True))) != len(names):
        raise UserError(
            f"--labelled={config.labelled} names a set twice; give each a column of "
            "its own with --label_column"
        )
    sets = []
    for name, label, attribute in zip(names, labels, attributes, strict=True):
        if name in hub_sets.SETS:
            found = hub_sets.read(name, rows=config.train_size + config.test_size)
            sets += [_text_set(*part) for part in found]
        else:
            rows, missing = _jsonl(name, config.text_column, label, attribute)
            notes = _left_out(missing, len(rows))
            title = Path(name).stem
            if names.count(name) > 1:
                title = f"{title}_{label}"
            sets.append(_text_set(title, rows, (), None, notes))
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
    notes: tuple[str, ...] = (),
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
    classes = classes or tuple(found)
    return TextSet(name, texts, labels, attributes, classes, in_test, notes)


def _jsonl(
    name: str, text: str, label: str, attribute: str
) -> tuple[list[hub_sets.Row], Counter[str]]:
    """The rows of a file that have every column, and how many lack which."""
    path = Path(name).expanduser()
    if path.suffix.lower() != ".jsonl" or not path.is_file():
        known = ", ".join(hub_sets.SETS)
        raise UserError(
            f"--labelled={name} is neither a .jsonl file here nor one of {known}"
        )
    columns = {"text_column": text, "label_column": label}
    columns |= {"attribute_column": attribute} if attribute else {}
    rows: list[hub_sets.Row] = []
    missing: Counter[str] = Counter()
    for row, where in json_rows(path):
        values = {
            flag: _value(row, column, flag, where) for flag, column in columns.items()
        }
        lacking = [flag for flag, value in values.items() if value is None]
        if lacking:
            missing[_MISSING[lacking[0]]] += 1
        else:
            rows.append(hub_sets.Row(*values.values()))
    if not rows:
        raise UserError(f"{path} holds no labelled text")
    return rows, missing


def _left_out(missing: Counter[str], kept: int) -> tuple[str, ...]:
    """A note on the rows that are left out, if any."""
    if not missing:
        return ()
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in missing.items())
    left, total = missing.total(), missing.total() + kept
    return (f"{left:,} of {total:,} rows are left out: {kinds}",)


def _value(row: dict[str, Any], column: str, flag: str, where: str) -> Any:
    """A column as text; None where it is null, blank, NaN or infinite, which is how a
    table's missing numbers are written."""
    if column not in row:
        raise no_column(flag, column, row, where)
    value = row[column]
    is_text = flag == "text_column"
    if isinstance(value, list | dict) or (
        is_text and not isinstance(value, str | None)
    ):
        raise UserError(
            f"{where}: --{flag}={column} is of type {type(value).__name__}, not "
            + ("text" if is_text else "a label")
        )
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return None
    # JSON can spell lone surrogates, which no tokenizer takes.
    value = str(value).encode("utf-8", "replace").decode("utf-8")
    return value if value.strip() else None
