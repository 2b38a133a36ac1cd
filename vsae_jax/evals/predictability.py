"""Predictability: do single latents fire on what the text says, read without a judge?

A latent's firings on the first half of the held-out contexts say how often it fires on
each token, and on each token after each other; from these its firings on the second
half are predicted. Its score is the area under the ROC curve: how probably a position
where it fires is given more than one where it does not. 1: the token tells all, as of
a latent for one word; 0.5: it tells nothing. That a high one is interpretable is
plausible, that a low one is not does not follow: what fires on a topic or on a place
in the sentence is missed. Beside it, how few types of tokens carry half of a latent's
activation.

    p(fires | token) = (firings on it + p) / (its count + 1),  p: the firing rate
    p(fires | two tokens) = (firings on them + p(fires | token)) / (their count + 1)

The same is computed of random directions, spread as the decoder's rows are, that fire
where they are largest along rows of norm 1, as often as latents of the run; and of the
latents with tokens that were shuffled over the positions. Rows of norm 1: otherwise
most directions would fire on the same few giant rows. As rare latents are told more
easily, medians are given within bins of firing rates too.
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

# Firings in each half of the contexts below which a latent is left out.
ENOUGH = 10
GOOD = 0.9
# Drawn at random where there are more: positions that firings are compared with, a
# latent's firings, and latents that have baselines.
MOST_POSITIONS, MOST_FIRINGS, MOST_BASELINES = 4096, 256, 512
# Bins of firing rates: half a decade each.
_EDGES = 10.0 ** np.arange(-5, 0.5, 0.5)
_ROWS_AT_ONCE, _DIRECTIONS_AT_ONCE = 4096, 64
_DIGITS = 3

Rows = Float[np.ndarray, "rows d_model"]
PerLatent = Float[np.ndarray, " latents"]
PerRow = Int[np.ndarray, " rows"]


class Text(NamedTuple):
    """The tokens at each position as numbers from 0, those that are alike the same, of
    the token alone and of it and the one before; and which positions are learned from,
    the others being predicted."""

    token: PerRow
    bigram: PerRow
    learned: Bool[np.ndarray, " rows"]


class Scores(NamedTuple):
    """Of each latent, NaN where it fires too seldom: the share of positions on which it
    fires, areas under the curve, and types of tokens with half of its activation."""

    firing_rate: PerLatent
    auc_by_token: PerLatent
    auc_by_bigram: PerLatent
    token_types: PerLatent


def check(subjects: Sequence[Subject]) -> None:
    """Refuses tokens of which none counts, and a single context: one is learned from
    and another predicted."""
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
    """Tokens, the tokens before them (-1: none) and numbers of their contexts; the
    first half of these is learned from."""
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
    """Of `n_latents` latents with these firings, whose rows are positions of `text`."""
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
    """Those of some latents, numbered as in `which`."""
    place = np.full(n_latents, -1)
    place[which] = np.arange(len(which))
    latent = place[firings.latent]
    return Firings(*(a[latent >= 0] for a in (firings.row, latent, firings.value)))


def _areas(firings: Firings, text: Text, n_latents: int) -> tuple[PerLatent, PerLatent]:
    """Under the ROC curves by token and by bigram; NaN of a latent that fires at all
    positions it could be compared with."""
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
        # What the token says is what its bigrams fall back on.
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
    """The matrix with these values (each 1) at these places; what is at the same place
    is added."""
    values = np.ones(len(i), np.float32) if values is None else values
    return sparse.csr_matrix((values, (i, j)), shape=shape)


def _at_most(
    count: int, latent: Int[np.ndarray, " n"], rng: np.random.Generator
) -> Int[np.ndarray, " some"]:
    """At most `count` places of each latent, drawn at random, in the latents' order."""
    order = rng.permutation(len(latent))
    order = order[np.argsort(latent[order], kind="stable")]
    first = np.searchsorted(latent[order], latent[order])
    return order[np.arange(len(order)) - first < count]


def _area(
    positive: Float[np.ndarray, " n"],
    bounds: Int[np.ndarray, " latents + 1"],
    others: Float[np.ndarray, "latents positions"],
) -> PerLatent:
    """How probably one of a latent's positives, from its bound to the next, is above
    one of its finite others; as much as below is half."""
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
    """How few types of tokens carry half of a latent's activation."""
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
    """With the second moments of the decoder's rows."""
    unit = unit_rows(w_dec)
    size, axes = np.linalg.eigh(unit.T @ unit)
    spread = axes * np.sqrt(np.maximum(size, 0))
    drawn = rng.standard_normal((count, len(size))) @ spread.T
    return drawn.astype(np.float32)


def _largest(
    x: Rows, directions: Float[np.ndarray, "latents d_model"], rate: PerLatent
) -> Firings:
    """Firings where each direction is largest, on the share `rate` of the rows, with
    values from there up."""
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
    """How many latents with a firing rate above `low` and up to `high` have scores, and
    what these are; None where none has. `each`: by what their names start with."""
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
