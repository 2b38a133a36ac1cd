"""The rows of a labelled set that a probe is trained and tested on.

Every draw has a random generator of its own, made from the seed and from the names of
what it is for, so that a score does not depend on what was evaluated before.
"""

import zlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from vsae_jax.evals.labelled import TextSet

# A class, or a label with an attribute, needs at least this many rows.
LEAST = 10
_TEST_SHARE = 0.2

Rows = Int[np.ndarray, " rows"]


class Split(NamedTuple):
    """Rows by class, the same number for each: `[rows per class]`."""

    train: Mapping[str, Rows]
    test: Mapping[str, Rows]


class Sample(NamedTuple):
    """A balanced binary problem in random order; labels are 1 and 0."""

    rows: Rows
    labels: Float[np.ndarray, " rows"]


def generator(seed: int, *names: object) -> np.random.Generator:
    """The generator for what is named."""
    words = [zlib.crc32(str(name).encode()) for name in names]
    return np.random.default_rng([seed, *words])


def by_class(s: TextSet, *, train_size: int, test_size: int, seed: int) -> Split:
    """Rows to train and to test on: at most `train_size // 2` and `test_size // 2` of
    each class, the same number for all; if the set has two attributes, half with each
    (docs/saebench.md 3). A class with fewer than `LEAST` rows is left out."""
    strata = {c: _strata(s, c, seed) for c in s.classes}
    strata = {c: parts for c, parts in strata.items() if _smallest(parts) >= LEAST}
    sizes = (train_size // 2, test_size // 2)
    parts = max(map(len, strata.values()), default=1)
    n_train, n_test = _room(
        [p for ps in strata.values() for p in ps], *(n // parts for n in sizes)
    )
    train = {
        c: np.concatenate([p[0][:n_train] for p in ps]) for c, ps in strata.items()
    }
    test = {c: np.concatenate([p[1][:n_test] for p in ps]) for c, ps in strata.items()}
    return Split(train, test)


def by_quadrant(
    s: TextSet, pair: tuple[str, str], *, train_size: int, test_size: int, seed: int
) -> Split:
    """Rows by (label, attribute), for a pair of labels and the set's two attributes,
    as `P+`, `P-`, `N+` and `N-`: 2 q rows of P+ and N-, which the biased task uses
    whole, and q of the others. q is at most a quarter of the sizes
    (docs/saebench.md 5.1)."""
    assert s.attributes is not None
    values = sorted(set(s.attributes.tolist()))
    strata = {
        name + sign: _halves(s, (s.labels == label) & (s.attributes == value), seed)
        for name, label in zip("PN", pair, strict=True)
        for sign, value in zip("+-", values, strict=True)
    }
    biased = ("P+", "N-")
    if _smallest(strata.values()) < LEAST:
        return Split({}, {})
    # A quadrant with 2 q rows counts as half.
    shares = [
        (part[0][1::2], part[1][1::2]) if name in biased else part
        for name, part in strata.items()
    ]
    n_train, n_test = _room(shares, train_size // 4, test_size // 4)
    sizes = {name: 2 if name in biased else 1 for name in strata}
    return Split(
        {n: part[0][: sizes[n] * n_train] for n, part in strata.items()},
        {n: part[1][: sizes[n] * n_test] for n, part in strata.items()},
    )


def one_vs_rest(
    rows: Mapping[str, Rows], positive: str, rng: np.random.Generator
) -> Sample:
    """All rows of a class against as many of the others, with the same number from
    each up to rounding (docs/saebench.md 2.2)."""
    own = rows[positive]
    others = [rows[name] for name in rows if name != positive]
    share = -(-len(own) // len(others))
    rest = np.concatenate([rng.permutation(other)[:share] for other in others])
    return _shuffled(own, rng.permutation(rest)[: len(own)], rng)


def against(positive: Rows, negative: Rows, rng: np.random.Generator) -> Sample:
    """One set of rows against another of the same size."""
    return _shuffled(positive, negative, rng)


def validation(sample: Sample) -> tuple[Sample, Sample]:
    """A training sample without its last fifth, and that fifth."""
    n = len(sample.rows) - max(len(sample.rows) // 5, 1)
    head, tail = (Sample(*(a[part] for a in sample)) for part in (np.s_[:n], np.s_[n:]))
    return head, tail


def _shuffled(positive: Rows, negative: Rows, rng: np.random.Generator) -> Sample:
    order = rng.permutation(len(positive) + len(negative))
    labels = np.repeat([1.0, 0.0], [len(positive), len(negative)]).astype(np.float32)
    return Sample(np.concatenate([positive, negative])[order], labels[order])


Halves = tuple[Rows, Rows]


def _strata(s: TextSet, label: str, seed: int) -> list[Halves]:
    """Train and test rows of a class, for each attribute if there are two."""
    if s.attributes is None or len(set(s.attributes.tolist())) != 2:
        return [_halves(s, s.labels == label, seed)]
    values = sorted(set(s.attributes.tolist()))
    masks = ((s.labels == label) & (s.attributes == value) for value in values)
    return [_halves(s, mask, seed) for mask in masks]


def _halves(s: TextSet, mask: np.ndarray, seed: int) -> Halves:
    """Train and test rows under a mask, in random order: by the set's own split, or
    else four to one."""
    rows = np.flatnonzero(mask)
    if s.in_test is not None:
        parts = rows[~s.in_test[rows]], rows[s.in_test[rows]]
        rngs = generator(seed, s.name, "train"), generator(seed, s.name, "test")
        return rngs[0].permutation(parts[0]), rngs[1].permutation(parts[1])
    rows = generator(seed, s.name, "split").permutation(rows)
    n_test = round(len(rows) * _TEST_SHARE)
    return rows[n_test:], rows[:n_test]


def _smallest(parts: "Sequence[Halves] | object") -> int:
    return min((len(train) + len(test) for train, test in parts), default=0)  # type: ignore


def _room(parts: Sequence[Halves], train: int, test: int) -> tuple[int, int]:
    return (
        min([train, *(len(part[0]) for part in parts)]),
        min([test, *(len(part[1]) for part in parts)]),
    )
