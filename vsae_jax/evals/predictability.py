"""Predictability: does the text tell when a latent fires? Measured without a judge.

From a latent's firings on the first half of the held-out contexts one knows how often
it fires on each token, and on each token after each other token. This predicts its
firings on the second half. Its score is the area under the ROC curve: the probability
that a position where it fires gets a higher prediction than one where it does not. 1
means that the token tells everything, as for a latent for one word; 0.5 that it tells
nothing. A latent with a high score is plausibly interpretable. One with a low score may
be, too: what fires on a topic or on a place in the sentence is missed. Also reported is
how few kinds of tokens carry half of a latent's activation.

    p(fires | token) = (firings on it + p) / (its count + 1),  p: the firing rate
    p(fires | two tokens) = (firings on them + p(fires | token)) / (their count + 1)

There are two baselines. Random directions, distributed like the decoder's rows, fire
where rows of norm 1 are largest along them, as often as latents of the run do. (Without
norm 1 most directions would fire on the same few giant rows.) And the run's latents are
scored with tokens shuffled over the positions. As rare latents are predicted more
easily, medians are also given within bins of firing rates.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy import sparse

from vsae_jax.autoencoder.reader import Reader
from vsae_jax.evals import Subject, latent_statistics
from vsae_jax.evals.held_out import check_counts, held_out
from vsae_jax.latents.firings import Firings, find_firings
from vsae_jax.latents.matching import unit_rows
from vsae_jax.system import progress
from vsae_jax.system.errors import UserError
from vsae_jax.system.threads import in_threads

# A latent with fewer firings in one half of the contexts is left out.
ENOUGH = 10
GOOD = 0.9
# At most this many are used, drawn at random: positions that firings are compared with,
# a latent's firings, and latents that have baselines.
MOST_POSITIONS, MOST_FIRINGS, MOST_BASELINES = 4096, 256, 512
# Bins of firing rates: half a decade each.
_EDGES = 10.0 ** np.arange(-5, 0.5, 0.5)
_ROWS_AT_ONCE, _DIRECTIONS_AT_ONCE = 4096, 64
_DIGITS = 3

Rows = Float[np.ndarray, "rows d_model"]
PerLatent = Float[np.ndarray, " latents"]
PerRow = Int[np.ndarray, " rows"]


class Text(NamedTuple):
    """The text at each position, as numbers from 0: one for each kind of token, and one
    for each kind of token with the one before it. `learned` is the mask of positions
    that are learned from; the others are predicted."""

    token: PerRow
    bigram: PerRow
    learned: Bool[np.ndarray, " rows"]


class Scores(NamedTuple):
    """Numbers of each latent: the share of positions on which it fires, areas under the
    curve, and kinds of tokens with half of its activation; NaN if it fires too
    rarely."""

    firing_rate: PerLatent
    auc_by_token: PerLatent
    auc_by_bigram: PerLatent
    token_types: PerLatent


def check(subjects: Sequence[Subject]) -> None:
    """Refuses tokens of which none counts, and a single context: one is to be learned
    from and another one predicted."""
    check_counts(subjects[0])
    if len(subjects[0].tokens) < 2:
        raise UserError(
            "--evals=predictability learns from half of the contexts and predicts the "
            "others, but there is one context; raise --num_tokens"
        )


def run(subjects: Sequence[Subject]) -> list[dict[str, Any]]:
    """`{"metrics", "by_firing_rate", "per_latent", "config"}` of each. The subjects
    share their language model, hook and tokens."""
    there = held_out(subjects[0])
    text = text_of(there.token, there.before, there.context)
    norm = np.linalg.norm(there.x, axis=1, keepdims=True)
    unit = there.x / np.maximum(norm, 1e-30)
    results = []
    with progress.bar(len(subjects), unit="arms") as bar:
        for result in in_threads(_work(subjects, there.x, unit, text)):
            results.append(result)
            bar.update(1)
    config = {"rows": len(text.token), "least_firings_in_each_half": ENOUGH}
    return [
        result | {"config": subject.config | config}
        for subject, result in zip(subjects, results, strict=True)
    ]


def text_of(token: PerRow, before: PerRow, context: PerRow) -> Text:
    """The text of tokens, the tokens before them (-1: none) and the numbers of their
    contexts, of which the first half is learned from."""
    both = (before.astype(np.int64) + 1) * (int(token.max(initial=0)) + 1) + token
    each = [np.unique(a, return_inverse=True)[1] for a in (token, both)]
    middle = (int(context.min(initial=0)) + int(context.max(initial=0)) + 1) / 2
    return Text(each[0], each[1], context < middle)


def _work(
    subjects: Sequence[Subject], x: Rows, unit: Rows, text: Text
) -> Iterator[Callable[[], dict[str, Any]]]:
    for subject in subjects:
        firings = _encoded(subject.reader, x)
        w_dec = np.asarray(subject.reader.variables["params"]["w_dec"])
        yield partial(_result, firings, w_dec, unit, text)


def _encoded(reader: Reader, x: Rows) -> Firings:
    parts = []
    for start in range(0, len(x), _ROWS_AT_ONCE):
        f = np.asarray(reader.encode(x[start : start + _ROWS_AT_ONCE]))
        row, latent, value = find_firings(f)
        parts.append(((row + start).astype(np.int32), latent.astype(np.int32), value))
    return Firings(*(np.concatenate(part) for part in zip(*parts, strict=True)))


def _result(
    firings: Firings, w_dec: Float[np.ndarray, "d_sae d_model"], unit: Rows, text: Text
) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    of_latents = scores(firings, text, n_latents=len(w_dec))
    known = np.flatnonzero(np.isfinite(of_latents.auc_by_token))
    some = rng.permutation(known)[:MOST_BASELINES]
    rate = of_latents.firing_rate[some]
    directions = _random_directions(w_dec, len(some), rng)
    order = rng.permutation(len(unit))
    shuffled = Text(text.token[order], text.bigram[order], text.learned)
    each = {
        "": of_latents,
        "random_directions_": scores(
            _largest(unit, directions, rate), text, n_latents=len(some)
        ),
        "shuffled_tokens_": scores(
            _of_latents(firings, some, len(w_dec)), shuffled, n_latents=len(some)
        ),
    }
    bins = zip(_EDGES, _EDGES[1:], strict=False)
    return {
        "metrics": _summaries(each),
        "by_firing_rate": [
            {"from": float(low), "to": float(high)} | _summaries(each, low, high)
            for low, high in bins
        ],
        "per_latent": latent_statistics.rounded(of_latents._asdict(), digits=_DIGITS),
    }


def scores(firings: Firings, text: Text, *, n_latents: int) -> Scores:
    """The scores of `n_latents` latents with these firings at positions of `text`."""
    counts = [
        np.bincount(firings.latent[half], minlength=n_latents)
        for half in (text.learned[firings.row], ~text.learned[firings.row])
    ]
    which = np.flatnonzero(np.minimum(*counts) >= ENOUGH)
    mine = _of_latents(firings, which, n_latents)
    found = np.full((3, n_latents), np.nan)
    found[:2, which] = _areas(mine, text, len(which))
    found[2, which] = _types_with_half(mine, text.token, len(which))
    return Scores(np.add(*counts) / len(text.token), *found)


def _of_latents(
    firings: Firings, which: Int[np.ndarray, " n"], n_latents: int
) -> Firings:
    """The firings of the latents `which`, numbered by their places in it."""
    place = np.full(n_latents, -1)
    place[which] = np.arange(len(which))
    latent = place[firings.latent]
    return Firings(*(a[latent >= 0] for a in (firings.row, latent, firings.value)))


def _areas(firings: Firings, text: Text, n_latents: int) -> tuple[PerLatent, PerLatent]:
    """The areas under the ROC curves by token and by bigram; NaN for a latent that
    fires at every position that it could be compared with."""
    rng = np.random.default_rng(0)
    learned = text.learned[firings.row]
    row, latent = firings.row[~learned], firings.latent[~learned]
    sample = rng.permutation(np.flatnonzero(~text.learned))[:MOST_POSITIONS]
    place = np.full(len(text.token), -1)
    place[sample] = np.arange(len(sample))
    fires = np.zeros((n_latents, len(sample)), bool)
    fires[latent[place[row] >= 0], place[row[place[row] >= 0]]] = True
    some = _at_most(MOST_FIRINGS, latent, rng)
    row, latent = row[some], latent[some]
    bounds = np.searchsorted(latent, np.arange(n_latents + 1))

    rate = np.bincount(firings.latent[learned], minlength=n_latents)
    rate = (rate / max(text.learned.sum(), 1)).astype(np.float32)
    here, there = rate[latent], np.broadcast_to(rate[:, None], fires.shape)
    areas = []
    for ids in (text.token, text.bigram):
        shape = n_latents, int(ids.max(initial=-1)) + 1
        fired = _sums(firings.latent[learned], ids[firings.row[learned]], shape=shape)
        count = np.bincount(ids[text.learned], minlength=shape[1]).astype(np.float32)
        # A bigram falls back on what its token predicts.
        here = (np.asarray(fired[latent, ids[row]]).ravel() + here) / (
            count[ids[row]] + 1
        )
        there = (fired[:, ids[sample]].toarray() + there) / (count[ids[sample]] + 1)
        areas.append(_area(here, bounds, np.where(fires, np.inf, there)))
    return areas[0], areas[1]


def _sums(
    i: Int[np.ndarray, " n"],
    j: Int[np.ndarray, " n"],
    values: Float[np.ndarray, " n"] | None = None,
    *,
    shape: tuple[int, int],
) -> sparse.csr_matrix:
    """The matrix with these values (or ones) at these places; values at the same place
    add up."""
    values = np.ones(len(i), np.float32) if values is None else values
    return sparse.csr_matrix((values, (i, j)), shape=shape)


def _at_most(
    count: int, latent: Int[np.ndarray, " n"], rng: np.random.Generator
) -> Int[np.ndarray, " some"]:
    """At most `count` places of each latent, drawn at random, sorted by latent."""
    order = rng.permutation(len(latent))
    order = order[np.argsort(latent[order], kind="stable")]
    first = np.searchsorted(latent[order], latent[order])
    return order[np.arange(len(order)) - first < count]


def _area(
    positive: Float[np.ndarray, " n"],
    bounds: Int[np.ndarray, " latents + 1"],
    others: Float[np.ndarray, "latents positions"],
) -> PerLatent:
    """The probability that one of a latent's positives (those between two bounds) is
    above one of its finite others; ties count half."""
    others = np.sort(others, axis=1)
    counts = np.isfinite(others).sum(axis=1)
    areas = np.full(len(others), np.nan)
    for n, (row, count) in enumerate(zip(others, counts, strict=True)):
        own = positive[bounds[n] : bounds[n + 1]]
        if count and len(own):
            below = row.searchsorted(own, "left") + row.searchsorted(own, "right")
            areas[n] = below.mean() / (2 * count)
    return areas


def _types_with_half(firings: Firings, token: PerRow, n_latents: int) -> PerLatent:
    """The fewest kinds of tokens that carry half of each latent's activation."""
    shape = n_latents, int(token.max(initial=-1)) + 1
    size = np.abs(firings.value).astype(np.float64)
    by_type = _sums(firings.latent, token[firings.row], size, shape=shape)
    found = np.zeros(n_latents)
    for n, (start, stop) in enumerate(zip(by_type.indptr, by_type.indptr[1:])):
        held = np.cumsum(np.sort(by_type.data[start:stop])[::-1])
        found[n] = np.searchsorted(held, held[-1] / 2) + 1
    return found


def _random_directions(
    w_dec: Float[np.ndarray, "d_sae d_model"], count: int, rng: np.random.Generator
) -> Float[np.ndarray, "count d_model"]:
    """Random directions with the second moments of the decoder's rows."""
    unit = unit_rows(w_dec)
    size, axes = np.linalg.eigh(unit.T @ unit)
    spread = axes * np.sqrt(np.maximum(size, 0))
    drawn = rng.standard_normal((count, len(size))) @ spread.T
    return drawn.astype(np.float32)


def _largest(
    x: Rows, directions: Float[np.ndarray, "latents d_model"], rate: PerLatent
) -> Firings:
    """Firings of each direction on the share `rate` of the rows where it is largest;
    their values are measured from the largest row without a firing."""
    rows, values = [np.zeros(0, np.int64)], [np.zeros(0, np.float32)]
    fired = np.round(rate * len(x)).astype(int)
    for start in range(0, len(directions), _DIRECTIONS_AT_ONCE):
        along = directions[start : start + _DIRECTIONS_AT_ONCE] @ x.T
        for each, count in zip(along, fired[start:], strict=False):
            order = np.argpartition(each, len(x) - count - 1)
            rows.append(order[len(x) - count :])
            values.append(each[rows[-1]] - each[order[len(x) - count - 1]])
    latent = np.repeat(np.arange(len(fired)), fired)
    return Firings(np.concatenate(rows), latent, np.concatenate(values))


def _summaries(
    each: Mapping[str, Scores], low: float = 0, high: float = 1
) -> dict[str, float | None]:
    """Summaries of the scores of latents with a firing rate above `low` and up to
    `high`, and how many have one; None where none has. `each`: scores by the prefix of
    their names."""
    found: dict[str, float | None] = {}
    for prefix, one in each.items():
        rate = one.firing_rate
        known = np.isfinite(one.auc_by_token) & (rate > low) & (rate <= high)
        found[f"{prefix}latents"] = float(known.sum())
        some = known.any()
        for by in ("auc_by_token", "auc_by_bigram"):
            auc = getattr(one, by)[known]
            found[f"{prefix}{by}_median"] = float(np.median(auc)) if some else None
            above = float((auc > GOOD).mean()) if some else None
            found[f"{prefix}{by}_above_{GOOD}"] = above
        types = one.token_types[known]
        found[f"{prefix}token_types_median"] = float(np.median(types)) if some else None
    return found
