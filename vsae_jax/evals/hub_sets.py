"""SAEBench's labelled data sets by name, from the hub (docs/saebench.md 3, 4 and 5)."""

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from vsae_jax.lm.files import connection_errors
from vsae_jax.system.errors import UserError, one_line

# The head of a file, often its license, is skipped; shorter files are left out.
_CODE_HEAD, _CODE_LEAST = 150, 534
_EXTENSIONS = {
    "C": (".c", ".h"),
    "Python": (".py",),
    "HTML": (".html",),
    "Java": (".java",),
    "PHP": (".php", ".php3", ".php4", ".php5", ".phps", ".phpt"),
}
_EUROPARL = {"en": "en-fr", "fr": "fr-it", "de": "de-en", "es": "es-fr", "nl": "nl-pt"}


class Row(NamedTuple):
    """A text, its label and, where there is one, its attribute."""

    text: str
    label: str
    attribute: str | None = None


# Name, rows, classes to probe for (empty: all), and which rows are the test split.
Found = tuple[str, list[Row], tuple[str, ...], np.ndarray | None]


class Columns(NamedTuple):
    """A hub data set with splits train and test, and what to probe for in it."""

    path: str
    text: str
    label: str
    attribute: str | None
    parts: dict[str, tuple[str, ...]]


_COLUMNS = {
    "bias_in_bios": Columns(
        "LabHC/bias_in_bios",
        "hard_text",
        "profession",
        "gender",
        {
            "bias_in_bios_class_set1": ("0", "1", "2", "6", "9"),
            "bias_in_bios_class_set2": ("11", "13", "14", "18", "19"),
            "bias_in_bios_class_set3": ("20", "21", "22", "25", "26"),
        },
    ),
    "amazon_reviews": Columns(
        "canrager/amazon_reviews_mcauley_1and5",
        "text",
        "category",
        "rating",
        {"amazon_reviews_1and5": ("1", "2", "3", "5", "6")},
    ),
    "ag_news": Columns(
        "fancyzhx/ag_news", "text", "label", None, {"ag_news": ("0", "1", "2", "3")}
    ),
}
# Sets that SAEBench uses only for sparse probing.
PROBING_ONLY = frozenset(
    "bias_in_bios_class_set2 bias_in_bios_class_set3 "
    "amazon_reviews_1and5_sentiment".split()
)
# SAEBench's pairs of classes for SCR; other sets use all pairs of their classes.
SCR_PAIRS = {
    "bias_in_bios_class_set1": (("21", "13"), ("1", "11"), ("25", "22"), ("2", "26")),
    "amazon_reviews_1and5": (("24", "26"), ("30", "6"), ("18", "11"), ("3", "1")),
}


def read(name: str, *, rows: int) -> list[Found]:
    """The sets under one of SAEBench's names; of streamed ones only `rows` rows per
    class are read."""
    try:
        return SETS[name](name, rows)
    except connection_errors() as error:
        raise UserError(
            f"--labelled={name} is on the hub, which cannot be reached "
            f"({one_line(error)}); name a local .jsonl file instead"
        ) from None


def _with_splits(name: str, rows: int) -> list[Found]:
    del rows
    import datasets

    columns = _COLUMNS[name]
    loaded = datasets.load_dataset(columns.path)
    splits = [list(_rows(loaded[split], columns)) for split in ("train", "test")]
    in_test = np.repeat([False, True], [len(split) for split in splits])
    both = splits[0] + splits[1]
    found: list[Found] = [(n, both, c, in_test) for n, c in columns.parts.items()]
    if name == "amazon_reviews":
        ratings = [Row(row.text, str(row.attribute)) for row in both]
        found.append(("amazon_reviews_1and5_sentiment", ratings, (), in_test))
    return found


def _rows(split: Iterable[Any], columns: Columns) -> Iterator[Row]:
    for row in split:
        if not row[columns.text] or row[columns.text].isspace():
            continue
        attribute = None if columns.attribute is None else str(row[columns.attribute])
        yield Row(row[columns.text], str(row[columns.label]), attribute)


def _europarl(name: str, rows: int) -> list[Found]:
    import datasets

    found = []
    for language, pair in _EUROPARL.items():
        stream = datasets.load_dataset(
            "Helsinki-NLP/europarl", pair, streaming=True, split="train"
        )
        texts = (row["translation"][language] for row in stream)
        texts = (text for text in texts if text and not text.isspace())
        found += [Row(text, language) for text in itertools.islice(texts, rows)]
    return [(name, found, tuple(_EUROPARL), None)]


def _github_code(name: str, rows: int) -> list[Found]:
    """Code with its language, which the file extension tells, as in the data set's own
    script. `datasets` no longer runs scripts, so its parquet files are read."""
    import datasets

    files = "hf://datasets/codeparrot/github-code/data/*.parquet"
    stream = datasets.load_dataset(
        "parquet", data_files=files, streaming=True, split="train"
    )
    return [(name, _code_rows(stream, rows), tuple(_EXTENSIONS), None)]


def _code_rows(stream: Iterable[dict[str, Any]], rows: int) -> list[Row]:
    found, counts = [], Counter[str]()
    for row in stream:
        language = _language(row["path"])
        code = row["content"]
        if language and counts[language] < rows and len(code) > _CODE_LEAST:
            counts[language] += 1
            found.append(Row(code[_CODE_HEAD:], language))
            if sum(counts.values()) == rows * len(_EXTENSIONS):
                break
    return found


def _language(path: str) -> str | None:
    endings: Sequence[tuple[str, tuple[str, ...]]] = tuple(_EXTENSIONS.items())
    return next((name for name, ends in endings if path.endswith(ends)), None)


SETS: dict[str, Callable[[str, int], list[Found]]] = {
    **{name: _with_splits for name in _COLUMNS},
    "europarl": _europarl,
    "github-code": _github_code,
}
