"""Stability: do a run's latents come back when it is trained from another seed?

Compares every two runs of a grid that differ only in their seeds, on held-out rows.
Latents that fire at least `ENOUGH` times in their run are paired one to one (Hungarian
assignment), once by the cosine of their decoder rows and once by the correlation of
their activations over the rows. For both there is a chance level, computed once for all
runs that differ only in seeds: as many random directions, distributed like the
decoder's rows; and activations whose rows are shifted against each other. The nearest
other latent of the same run tells how crowded the directions are. A run's numbers are
means over its pairs.

"Both above 0.7" and "same partner" are the measure of Paulo and Belrose
(arXiv 2501.16615): encoder and decoder cosine of a pair that is matched by its decoder,
and also by its encoder. "Nearest in the other run" asks, as Gerasimov et al.
(arXiv 2606.12138) do, whether there is a similar latent, even if another latent is
paired with it. Theirs is also the question whether the latents that do not return span
the same subspace in both runs.
"""

import itertools
import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from vsae_jax.autoencoder.reader import Reader, jit_encode
from vsae_jax.config import RUNTIME_FIELDS
from vsae_jax.config.fields import to_json
from vsae_jax.evals import Subject, latent_statistics
from vsae_jax.evals.held_out import check_counts, held_out
from vsae_jax.evals.tasks import mean_metrics
from vsae_jax.latents.matching import CLOSE, by_chance, unit_rows
from vsae_jax.system import progress
from vsae_jax.system.errors import UserError
from vsae_jax.system.threads import in_threads

# A latent with fewer firings on the rows is left out: its correlation would be noise.
ENOUGH = 20
# A subspace is that which holds this share of the squared norm of the latents.
_SPANNED = 0.9
_ROWS_AT_ONCE = 4096
# Bytes of products of activations on the device: 16 pairs of 8,192 latents.
_PRODUCT_BYTES = 2**32
_DIGITS = 3

Rows = Float[np.ndarray, "rows d_model"]
Products = Float[np.ndarray, "d_a d_b"]
PerLatent = Float[np.ndarray, " d_sae"]


class _Latents(NamedTuple):
    """A run's latents that fire often enough on the rows: which they are, their unit
    rows of decoder and encoder, and the sum of |f|, mean and standard deviation of
    each.

    rate: the share of rows on which each latent of the run fires.
    """

    which: Int[np.ndarray, " n"]
    decoder: Float[np.ndarray, "n d_model"]
    encoder: Float[np.ndarray, "n d_model"]
    magnitude: Float[np.ndarray, " n"]
    mean: Float[np.ndarray, " n"]
    std: Float[np.ndarray, " n"]
    rate: PerLatent


class _Pair(NamedTuple):
    """The places of two runs among the subjects, and by how many rows the second's are
    shifted against the first's."""

    a: int
    b: int
    shift: int = 0


class _Match(NamedTuple):
    """Pairs of latents i of one run and j of another, and the value they were matched
    by."""

    i: Int[np.ndarray, " pairs"]
    j: Int[np.ndarray, " pairs"]
    value: Float[np.ndarray, " pairs"]

    @property
    def turned(self) -> "_Match":
        """The same seen from the other run."""
        return _Match(self.j, self.i, self.value)


class _Part(NamedTuple):
    """Numbers of the run at `place`: about what it finds in the run at `other`, or
    (None) about itself and its kind. per_latent: `[d_sae]` each, NaN where unknown."""

    place: int
    other: int | None
    metrics: dict[str, float | None]
    per_latent: Mapping[str, PerLatent] = {}


def check(subjects: Sequence[Subject]) -> None:
    """Refuses runs among which no two differ only in their seeds, and tokens of which
    none counts."""
    check_counts(subjects[0])
    if not _kinds(subjects):
        raise UserError(
            "--evals=stability needs runs that differ in nothing but seeds; train "
            "a grid with --seed=0,1,2 and give its folder as --run"
        )


def run(subjects: Sequence[Subject]) -> list[dict[str, Any]]:
    """`{"metrics", "pairs", "per_latent", "config"}` of each; a run without a pair has
    no metrics."""
    rows, kinds = held_out(subjects[0]).x, _kinds(subjects)
    parts: list[list[_Part]] = [[] for _ in subjects]
    with progress.bar(sum(map(len, kinds)), unit="pairs of runs") as bar:
        for found in in_threads(_work(subjects, kinds, rows)):
            for part in found:
                parts[part.place].append(part)
            bar.update(int(any(part.other is not None for part in found)))
    config = {"rows": len(rows), "least_firings": ENOUGH, "subspace_share": _SPANNED}
    return [
        _result(subjects, each) | {"config": subject.config | config}
        for subject, each in zip(subjects, parts, strict=True)
    ]


def _kinds(subjects: Sequence[Subject]) -> list[list[_Pair]]:
    """The pairs of runs that differ only in their seeds, grouped by the settings that
    they share."""
    kinds: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for place, subject in enumerate(subjects):
        if subject.run.train is not None:
            config = to_json(subject.run.train)
            seed = config.pop("seed")
            kind = {n: v for n, v in config.items() if n not in RUNTIME_FIELDS}
            rows = {n: v for n, v in subject.run.data.items() if n != "forked_from"}
            kinds[json.dumps([kind, rows], sort_keys=True)].append((place, seed))
    pairs = (
        [_Pair(i, j) for (i, s), (j, t) in itertools.combinations(each, 2) if s != t]
        for each in kinds.values()
    )
    return [each for each in pairs if each]


def _work(
    subjects: Sequence[Subject], kinds: Sequence[Sequence[_Pair]], rows: Rows
) -> Iterator[Callable[[], list[_Part]]]:
    """The computations, kind by kind. Each run encodes the rows once for its own
    numbers, and once for the products with all runs of its kind."""
    for pairs in kinds:
        places = sorted({place for pair in pairs for place in (pair.a, pair.b)})
        readers = {i: subjects[i].reader for i in places}
        latents = {i: _latents(readers[i], rows) for i in places}
        for i in places:
            yield partial(_alone, i, latents[i])
        # The chance level of the first pair alone: a kind's pairs hardly differ in it.
        alive = (
            p for p in pairs if latents[p.a].which.size and latents[p.b].which.size
        )
        shifted = [p._replace(shift=len(rows) // 2) for p in itertools.islice(alive, 1)]
        for pair, products in _products(readers, [*shifted, *pairs], rows):
            a, b = latents[pair.a], latents[pair.b]
            if pair.shift:
                yield partial(_by_chance, places, a, b, products, len(rows))
            else:
                yield partial(_compared, pair, a, b, products, len(rows))


def _latents(reader: Reader, rows: Rows) -> _Latents:
    sums = np.zeros((4, reader.config.d_sae))
    for start in range(0, len(rows), _ROWS_AT_ONCE):
        sums += np.asarray(_sums(reader, rows[start : start + _ROWS_AT_ONCE]))
    which = np.flatnonzero(sums[0] >= ENOUGH)
    _, magnitude, total, squares = sums[:, which]
    mean = total / len(rows)
    params = reader.variables["params"]
    return _Latents(
        which=which,
        decoder=unit_rows(np.asarray(params["w_dec"])[which]),
        encoder=unit_rows(np.asarray(params["w_enc"]).T[which]),
        magnitude=magnitude,
        mean=mean,
        std=np.sqrt(np.maximum(squares / len(rows) - mean**2, 0)),
        rate=sums[0] / len(rows),
    )


@jit_encode
def _sums(reader: Reader, x: Float[Array, "rows d_model"]) -> Float[Array, "4 d_sae"]:
    f = reader.encode(x)
    each = (f != 0).astype(jnp.float32), jnp.abs(f), f, jnp.square(f)
    return jnp.stack([jnp.sum(values, axis=0) for values in each])


def _products(
    readers: Mapping[int, Reader], pairs: Sequence[_Pair], rows: Rows
) -> Iterator[tuple[_Pair, Products]]:
    """Each pair's sum over rows of the products of its activations. They are added up
    on the device, for as many pairs at once as fit into `_PRODUCT_BYTES`."""
    d_sae = readers[pairs[0].a].config.d_sae
    at_once = max(_PRODUCT_BYTES // (4 * d_sae**2), 1)
    for first in range(0, len(pairs), at_once):
        some = pairs[first : first + at_once]
        totals = [jnp.zeros((d_sae, d_sae)) for _ in some]
        for start in range(0, len(rows), _ROWS_AT_ONCE):
            part = np.arange(start, min(start + _ROWS_AT_ONCE, len(rows)))
            runs = {one for p in some for one in ((p.a, 0), (p.b, p.shift))}
            f = {
                (i, shift): readers[i].encode(rows[(part - shift) % len(rows)])
                for i, shift in runs
            }
            for n, (a, b, shift) in enumerate(some):
                totals[n] = _added(totals[n], f[a, 0], f[b, shift])
        for pair in some:
            yield pair, np.asarray(totals.pop(0))


@partial(jax.jit, donate_argnums=0)
def _added(
    total: Float[Array, "d_a d_b"],
    f_a: Float[Array, "rows d_a"],
    f_b: Float[Array, "rows d_b"],
) -> Float[Array, "d_a d_b"]:
    return total + jnp.matmul(f_a.T, f_b, precision=jax.lax.Precision.HIGHEST)


def _correlation(
    a: _Latents, b: _Latents, products: Products, rows: int
) -> Float[np.ndarray, "n_a n_b"]:
    mean = products[np.ix_(a.which, b.which)].astype(np.float64) / rows
    mean -= np.outer(a.mean, b.mean)
    return mean / np.maximum(np.outer(a.std, b.std), 1e-30)


def _alone(place: int, latents: _Latents) -> list[_Part]:
    """How crowded a run's directions are, and how often its latents fire."""
    metrics: dict[str, float | None] = {}
    if latents.which.size:
        within = latents.decoder @ latents.decoder.T
        np.fill_diagonal(within, -1)
        metrics = _spread("nearest_within_run", within.max(axis=1))
    return [_Part(place, None, metrics, {"firing_rate": latents.rate})]


def _by_chance(
    places: Sequence[int], a: _Latents, b: _Latents, products: Products, rows: int
) -> list[_Part]:
    """The chance level of two runs of a kind, for all runs of the kind."""
    correlation = _matched(_correlation(a, b, products, rows)).value
    metrics = {
        **_spread("decoder_cosine_by_chance", by_chance(a.decoder, b.decoder)),
        **_spread("correlation_by_chance", correlation),
    }
    return [_Part(place, None, metrics) for place in places]


def _compared(
    pair: _Pair, a: _Latents, b: _Latents, products: Products, rows: int
) -> list[_Part]:
    """What two runs find in each other: one matching, seen from both sides."""
    if not a.which.size or not b.which.size:
        return [_Part(pair.a, pair.b, {}), _Part(pair.b, pair.a, {})]
    cosines = a.decoder @ b.decoder.T
    decoder, encoder = _matched(cosines), _matched(a.encoder @ b.encoder.T)
    firing = _matched(_correlation(a, b, products, rows))
    both = decoder.value > CLOSE
    both &= np.sum(a.encoder[decoder.i] * b.encoder[decoder.j], axis=1) > CLOSE
    same = np.full(len(a.which), -1)
    same[encoder.i] = encoder.j
    of_both = {
        "latents_that_return": float((decoder.value > CLOSE).sum()),
        "latents_that_return_by_correlation": float((firing.value > CLOSE).sum()),
        "both_above_0.7": float(both.mean()),
        "same_partner_both_above_0.7": float(
            (both & (same[decoder.i] == decoder.j)).mean()
        ),
        **_spread("decoder_cosine", decoder.value),
        **_spread("correlation", firing.value),
    }
    ones = _one_sided(a, b, cosines, decoder, firing)
    others = _one_sided(b, a, cosines.T, decoder.turned, firing.turned)
    return [
        _Part(pair.a, pair.b, of_both | ones[0], ones[1]),
        _Part(pair.b, pair.a, of_both | others[0], others[1]),
    ]


def _one_sided(
    a: _Latents,
    b: _Latents,
    cosines: Float[np.ndarray, "n_a n_b"],
    decoder: _Match,
    firing: _Match,
) -> tuple[dict[str, float | None], dict[str, PerLatent]]:
    """The numbers that depend on the side from which a pair is seen: of a run's latents
    together, and of each one."""
    close = decoder.value > CLOSE
    nearest = cosines.max(axis=1)
    lost, lost_there = (
        np.delete(rows, taken[close], axis=0)
        for rows, taken in ((a.decoder, decoder.i), (b.decoder, decoder.j))
    )
    inside, by_chance = _in_span(lost, lost_there)
    metrics = {
        "alive": float(len(a.which)),
        "activation_in_returning": float(
            a.magnitude[decoder.i][close].sum() / a.magnitude.sum()
        ),
        **_spread("nearest_in_other_run", nearest),
        "not_returning_in_their_subspace": inside,
        "not_returning_in_their_subspace_by_chance": by_chance,
    }
    per_latent = {}
    for name, which, values in (
        ("decoder_cosine", a.which[decoder.i], decoder.value),
        ("correlation", a.which[firing.i], firing.value),
        ("nearest_in_other_run", a.which, nearest),
    ):
        per_latent[name] = np.full(len(a.rate), np.nan)
        per_latent[name][which] = values
    return metrics, per_latent


def _in_span(
    rows: Float[np.ndarray, "n d_model"], others: Float[np.ndarray, "m d_model"]
) -> tuple[float | None, float | None]:
    """The share of the squared norm of `rows` that lies in the fewest principal
    directions which hold `_SPANNED` of that of `others`; and the share of a random
    direction that lies there."""
    if not len(rows) or not len(others):
        return None, None
    size, directions = np.linalg.eigh(others.T @ others)
    held = np.cumsum(size[::-1]) / size.sum()
    count = int(np.searchsorted(held, _SPANNED)) + 1
    inside = np.square(rows @ directions[:, -count:]).sum() / np.square(rows).sum()
    return float(inside), count / rows.shape[1]


def _matched(values: Float[np.ndarray, "a b"]) -> _Match:
    from scipy.optimize import linear_sum_assignment

    i, j = linear_sum_assignment(values, maximize=True)
    return _Match(i, j, values[i, j])


def _spread(name: str, values: Float[np.ndarray, " n"]) -> dict[str, float | None]:
    return {
        f"{name}_median": float(np.median(values)),
        f"{name}_above_0.7": float((values > CLOSE).mean()),
    }


def _result(subjects: Sequence[Subject], parts: Sequence[_Part]) -> dict[str, Any]:
    """A run's numbers, from those of its pairs, of itself and of its kind."""
    pairs = [part for part in parts if part.other is not None]
    metrics = mean_metrics([part.metrics for part in pairs])
    for part in parts:
        if part.other is None and metrics:
            metrics |= part.metrics
    names = dict.fromkeys(name for part in parts for name in part.per_latent)
    per_latent = {
        name: _mean_known([p.per_latent[name] for p in parts if name in p.per_latent])
        for name in names
    }
    return {
        "metrics": metrics,
        "pairs": [
            {"with": subjects[p.other].run.folder.name, "metrics": p.metrics}
            for p in pairs
            if p.other is not None
        ],
        "per_latent": latent_statistics.rounded(per_latent, digits=_DIGITS),
    }


def _mean_known(each: Sequence[PerLatent]) -> PerLatent:
    """The mean of those that are not NaN; NaN where all are."""
    known = np.isfinite(each)
    total = np.where(known, each, 0).sum(axis=0)
    return np.where(known.any(axis=0), total, np.nan) / np.maximum(known.sum(axis=0), 1)
