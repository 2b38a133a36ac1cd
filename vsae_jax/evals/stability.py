"""Stability: do the latents of one run come back when it is trained from another seed?

For every two runs of a grid that differ in nothing but their seeds, on held-out rows.
Latents that fire at least `ENOUGH` times in their run are paired one to one
(Hungarian assignment), once by the cosine of their decoder rows and once by the
correlation of their activations over the rows. Beside each stands what chance gives:
as many random directions, spread as the decoder's rows are; activations whose rows
were shifted against each other; and the nearest other latent of the same run, which
says how crowded directions are. A run's numbers are means over its pairs.

"Both above 0.7" is the measure of Paulo and Belrose (arXiv 2501.16615): encoder and
decoder cosine of a pair that was matched by its decoder.
"""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float
from scipy.optimize import linear_sum_assignment

from vsae_jax.autoencoder.reader import Reader, jit_encode
from vsae_jax.config import RUNTIME_FIELDS, TrainConfig
from vsae_jax.config.fields import to_json
from vsae_jax.evals import Subject
from vsae_jax.latents.matching import CLOSE, by_chance, unit_rows
from vsae_jax.system import progress
from vsae_jax.system.errors import UserError

# Firings on the rows below which a latent is left out: its correlation is noise.
ENOUGH = 20
_ROWS_AT_ONCE = 4096


class _Latents(NamedTuple):
    """A run's latents: unit rows of its decoder and encoder, which fire often enough on
    the rows, and sum of magnitudes, mean and standard deviation of each there."""

    decoder: Float[np.ndarray, "d_sae d_model"]
    encoder: Float[np.ndarray, "d_sae d_model"]
    alive: Bool[np.ndarray, " d_sae"]
    magnitude: Float[np.ndarray, " d_sae"]
    mean: Float[np.ndarray, " d_sae"]
    std: Float[np.ndarray, " d_sae"]


def check(subjects: Sequence[Subject]) -> None:
    """Refuses runs of which no two differ in nothing but their seeds."""
    if not _pairs(subjects):
        raise UserError(
            "--evals=stability needs runs that differ in nothing but seeds; train "
            "a grid with --seed=0,1,2 and give its folder as --run"
        )


def run(subjects: Sequence[Subject]) -> list[dict[str, Any]]:
    """`{"metrics", "pairs", "config"}` of each; no metrics of a run without a pair."""
    rows = _rows(subjects[0])
    latents = [_latents(subject, rows) for subject in subjects]
    found: list[list[dict[str, Any]]] = [[] for _ in subjects]
    pairs = _pairs(subjects)
    with progress.bar(len(pairs), unit="pairs of runs") as bar:
        for a, b in pairs:
            joint = _correlations(
                subjects[a], subjects[b], latents[a], latents[b], rows
            )
            for one, other, c in ((a, b, joint), (b, a, [x.T for x in joint])):
                name = subjects[other].run.folder.name
                measured = _compared(latents[one], latents[other], *c)
                found[one].append({"with": name, "metrics": measured})
            bar.update(1)
    return [
        {"metrics": _mean(each), "pairs": each, "config": s.config | _settings(rows)}
        for s, each in zip(subjects, found, strict=True)
    ]


def _pairs(subjects: Sequence[Subject]) -> list[tuple[int, int]]:
    """Places of runs that differ in their seeds and in nothing else."""
    kinds = [_kind_and_seed(s.run.train) for s in subjects]
    return [
        (i, j)
        for (i, one), (j, other) in itertools.combinations(enumerate(kinds), 2)
        if one and other and one[0] == other[0] and one[1] != other[1]
    ]


def _kind_and_seed(config: TrainConfig | None) -> tuple[dict[str, Any], int] | None:
    if config is None:
        return None
    kind = {n: v for n, v in to_json(config).items() if n not in RUNTIME_FIELDS}
    return kind, kind.pop("seed")


def _rows(subject: Subject) -> Float[np.ndarray, "rows d_model"]:
    """The held-out rows x that count."""
    found = []
    for tokens, keep, _ in subject.batches():
        values = jnp.asarray(subject.lm.at(tokens, [subject.reader.place])[0])
        found.append(np.asarray(subject.reader.rows(values))[keep.reshape(-1)])
    return np.concatenate(found)


def _latents(subject: Subject, rows: Float[np.ndarray, "rows d_model"]) -> _Latents:
    sums = np.zeros((4, subject.run.sae.d_sae))
    for part in _parts(rows):
        sums += np.asarray(_sums(subject.reader, part), np.float64)
    fired, magnitude, total, squares = sums
    mean = total / len(rows)
    variance = np.maximum(squares / len(rows) - mean**2, 0)
    params = subject.run.variables["params"]
    return _Latents(
        decoder=unit_rows(np.asarray(params["w_dec"])),
        encoder=unit_rows(np.asarray(params["w_enc"]).T),
        alive=fired >= ENOUGH,
        magnitude=magnitude,
        mean=mean,
        std=np.sqrt(variance),
    )


@jit_encode
def _sums(reader: Reader, x: Float[Array, "rows d_model"]) -> Float[Array, "4 d_sae"]:
    f = reader.encode(x)
    each = (f != 0).astype(jnp.float32), jnp.abs(f), f, jnp.square(f)
    return jnp.stack([jnp.sum(values, axis=0) for values in each])


@jit_encode
def _products(
    a: Reader,
    b: Reader,
    x: Float[Array, "rows d_model"],
    y: Float[Array, "rows d_model"],
) -> Float[Array, "d_a d_b"]:
    return jnp.matmul(a.encode(x).T, b.encode(y), precision=jax.lax.Precision.HIGHEST)


def _correlations(
    a: Subject,
    b: Subject,
    of_a: _Latents,
    of_b: _Latents,
    rows: Float[np.ndarray, "rows d_model"],
) -> list[Float[np.ndarray, "d_a d_b"]]:
    """Of activations on the same rows, and on rows shifted by half of them."""
    shifted = np.roll(rows, len(rows) // 2, axis=0)
    found = []
    for others in (rows, shifted):
        total = np.zeros((a.run.sae.d_sae, b.run.sae.d_sae))
        for x, y in zip(_parts(rows), _parts(others), strict=True):
            total += np.asarray(_products(a.reader, b.reader, x, y))
        covariance = total / len(rows) - np.outer(of_a.mean, of_b.mean)
        found.append(covariance / np.maximum(np.outer(of_a.std, of_b.std), 1e-30))
    return found


def _compared(
    a: _Latents,
    b: _Latents,
    correlation: Float[np.ndarray, "d_a d_b"],
    by_chance_correlation: Float[np.ndarray, "d_a d_b"],
) -> dict[str, float]:
    """What run a's latents find in run b."""
    if not a.alive.any() or not b.alive.any():
        return {}
    both = np.ix_(a.alive, b.alive)
    decoder, encoder = a.decoder[a.alive], a.encoder[a.alive]
    cosine = decoder @ b.decoder[b.alive].T
    i, j = linear_sum_assignment(cosine, maximize=True)
    matched = cosine[i, j]
    both_close = matched > CLOSE
    both_close &= np.sum(encoder[i] * b.encoder[b.alive][j], axis=1) > CLOSE
    magnitude = a.magnitude[a.alive]
    share = magnitude[i][matched > CLOSE].sum() / magnitude.sum()
    within = decoder @ decoder.T
    np.fill_diagonal(within, -1)
    found = {
        "decoder_cosine": matched,
        "decoder_cosine_by_chance": by_chance(decoder, b.decoder[b.alive]),
        "correlation": _matched(correlation[both]),
        "correlation_by_chance": _matched(by_chance_correlation[both]),
        "nearest_within_run": within.max(axis=1),
    }
    return {
        "alive": float(a.alive.sum()),
        "latents_that_return": float((matched > CLOSE).sum()),
        "both_above_0.7": float(both_close.mean()),
        "activation_in_returning": float(share),
        **{f"{name}_median": float(np.median(x)) for name, x in found.items()},
        **{f"{name}_above_0.7": float((x > CLOSE).mean()) for name, x in found.items()},
    }


def _matched(values: Float[np.ndarray, "a b"]) -> Float[np.ndarray, " pairs"]:
    i, j = linear_sum_assignment(values, maximize=True)
    return values[i, j]


def _parts(rows: Float[np.ndarray, "rows d_model"]) -> list[np.ndarray]:
    return [rows[i : i + _ROWS_AT_ONCE] for i in range(0, len(rows), _ROWS_AT_ONCE)]


def _mean(pairs: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    each = [pair["metrics"] for pair in pairs if pair["metrics"]]
    names = each[0] if each else {}
    return {name: float(np.mean([one[name] for one in each])) for name in names}


def _settings(rows: Float[np.ndarray, "rows d_model"]) -> dict[str, Any]:
    return {"rows": len(rows), "least_firings": ENOUGH}
