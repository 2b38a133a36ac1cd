"""Massive activations: rows with many times the usual norm, and one dimension with most
of the variance, as many language models have them.

They then dominate the explained variance, the loss and the scale of the input.
`extract` looks for them in a sample of its rows.
"""

from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from vsae_jax.activations.shards import Activations

# Multiples of the median norm.
MULTIPLES = (3, 5, 10)
SAMPLE_ROWS = 8192
_PIECES = 16
_MOST_TOKENS = 5
# Beyond these, a note says what can be done.
_LARGE_SHARE, _LARGE_MULTIPLE = 0.2, 10


class Massive(NamedTuple):
    """What was found in a sample of rows.

    dimension, variance_share: the dimension with the most variance, and its share.
    above: the share of rows whose norm is above each multiple of the median.
    tokens: the commonest tokens of the rows above the smallest multiple, and their
      shares of these rows.
    first_share: the share of these rows that are the first of their context.
    """

    n_rows: int
    dimension: int
    variance_share: float
    above: dict[int, float]
    tokens: list[tuple[int, float]]
    first_share: float


def sample(
    activations: Activations,
) -> tuple[Float[np.ndarray, "rows d_model"], Int[np.ndarray, " rows"], np.ndarray]:
    """Rows from places spread over the folder, with their tokens, and whether each is
    the first row of its context."""
    m = activations.manifest
    each = max(SAMPLE_ROWS // m.rows_per_context // _PIECES, 1)
    last = max(m.n_contexts - each, 0)
    starts = sorted(set(np.linspace(0, last, _PIECES).astype(int).tolist()))
    rows, tokens, first = [], [], []
    for start, following in zip(starts, [*starts[1:], m.n_contexts], strict=True):
        stop = min(start + each, following)
        span = start * m.rows_per_context, stop * m.rows_per_context
        rows.append(activations.view(*span).astype(np.float32))
        tokens.append(activations.tokens(start, stop)[:, m.dropped_positions :])
        first.append(np.arange(span[0], span[1]) % m.rows_per_context == 0)
    joined = np.concatenate([part.reshape(-1) for part in tokens])
    return np.concatenate(rows), joined, np.concatenate(first)


def look(
    rows: Float[np.ndarray, "rows d_model"],
    tokens: Int[np.ndarray, " rows"],
    first: np.ndarray,
) -> Massive:
    """What is massive in these rows; `first` says which are their context's first."""
    norms = np.linalg.norm(rows.astype(np.float64), axis=1)
    variance = rows.var(axis=0, dtype=np.float64)
    total, median = float(variance.sum()), float(np.median(norms))
    dimension = int(variance.argmax())
    large = norms > MULTIPLES[0] * median
    counts = Counter(tokens[large].tolist()).most_common(_MOST_TOKENS)
    return Massive(
        n_rows=len(rows),
        dimension=dimension,
        variance_share=float(variance[dimension]) / total if total else 0.0,
        above={n: float(np.mean(norms > n * median)) for n in MULTIPLES},
        tokens=[(token, count / int(large.sum())) for token, count in counts],
        first_share=float(np.mean(first[large])) if large.any() else 0.0,
    )


def described(found: Massive, name: Callable[[int], str]) -> str:
    """A description in one line, and more where something is massive; `name` gives a
    token's text."""
    shares = ", ".join(f"{share:.2%} above {n}" for n, share in found.above.items())
    lines = [
        f"of {found.n_rows:,} rows looked at: dimension {found.dimension} has "
        f"{found.variance_share:.1%} of the variance; norms in medians: {shares}"
    ]
    if found.tokens:
        tokens = ", ".join(f"{name(t)!r} {share:.0%}" for t, share in found.tokens)
        lines.append(
            f"rows above {MULTIPLES[0]} medians are of {tokens}; "
            f"{found.first_share:.0%} are the first of their context"
        )
    if found.variance_share > _LARGE_SHARE or found.above[_LARGE_MULTIPLE]:
        # The largest multiple that some row exceeds: a larger one leaves nothing out.
        reached = [n for n, share in found.above.items() if share]
        way = ""
        if reached:
            share = found.above[max(reached)]
            way = f"train --max_norm_multiple={max(reached)} leaves {share:.2%} of the "
            way += "rows out, and "
        lines.append(
            "note: these will dominate the explained variance and the scale of the "
            f"input; {way}evaluate's explained_variance_standardised and "
            "_ordinary_rows look past them"
        )
    return "\n".join(lines)
