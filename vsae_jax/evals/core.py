"""Core: the language model's loss with the autoencoder spliced in, and reconstruction.

SAEBench's `core` (docs/saebench.md 1) on one set of tokens:

    ce_loss_score = (CE_ablated - CE_sae) / (CE_ablated - CE_clean)     "loss recovered"
    kl_div_score  = (KL_ablated - KL_sae) / KL_ablated

A token counts if it is not special (BOS, EOS, padding) and has an activation row; at
other positions the activation stays as it is. The ablation sets every position to 0.
Both happen where the autoencoder reads: in the residual stream, or in what attention or
an MLP adds to it. The language model's clean and ablated passes serve all autoencoders
of a grid.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from vsae_jax.autoencoder import sae
from vsae_jax.autoencoder.density import density_histogram
from vsae_jax.autoencoder.reader import Reader, jit_encode
from vsae_jax.evals import Subject, latent_statistics
from vsae_jax.evals.metrics import (
    BatchSums,
    Reconstruction,
    batch_sums,
    ratio,
)
from vsae_jax.evals.quirks import Quirks
from vsae_jax.lm import Cut, LanguageModel
from vsae_jax.system import progress
from vsae_jax.system.errors import UserError

ORDINARY_MEDIANS = 3
# Bytes of spliced residual streams that run through the blocks above at once.
_STREAM_BYTES = 2**28
_MEDIAN_CONTEXTS = 32
_NOTHING = (
    "nothing to predict: every token is special, without an activation row, or the "
    "last of its context; evaluate on more or other text"
)


class Losses(NamedTuple):
    """Sums over a batch for one way to run the model: cross-entropy in nats over
    `predictions`, KL from the clean model over `positions`."""

    ce: np.float64
    kl: np.float64
    predictions: np.float64
    positions: np.float64


class Tally:
    """One autoencoder's sums over all batches."""

    def __init__(self) -> None:
        self.reconstruction = Reconstruction()
        self.losses: list[Losses] = []
        self.contexts_fired: Any = 0.0

    def add(self, sums: BatchSums, losses: Losses, contexts_fired: Array) -> None:
        """Adds a batch."""
        self.reconstruction.add(jax.device_get(sums))
        self.losses.append(losses)
        self.contexts_fired += np.asarray(contexts_fired, np.float64)


def check(subjects: Sequence[Subject]) -> None:
    """Refuses contexts that are too long for the model, and tokens of which none
    counts. The subjects share their language model and tokens."""
    first = subjects[0]
    most, length = first.lm.max_positions, first.tokens.shape[1]
    if most and length > most:
        raise UserError(
            f"contexts of {length} tokens do not fit the {most} positions of "
            f"--model={first.lm.name}; evaluate on shorter ones with --activations"
        )
    if not any(keep[:, :-1].any() for _, keep, _ in first.batches()):
        raise UserError(_NOTHING)


def run(subjects: Sequence[Subject], quirks: Quirks) -> list[dict[str, Any]]:
    """`{"metrics", "density_histogram", "per_latent", "config"}` of each. The subjects
    share their language model, hook and tokens."""
    first = subjects[0]
    base: list[list[Losses]] = []
    tallies = [Tally() for _ in subjects]
    limit = jnp.float32(ordinary_limit(first))
    each = list(zip(subjects, tallies, strict=True))
    batches = progress.forecast(
        first.batches(),
        count=-(-len(first.tokens) // first.batch_size),
        what=_described(subjects),
    )
    with progress.bar(len(first.tokens), unit="contexts") as bar:
        for tokens, keep, count in batches:
            cut = first.lm.cut(tokens, first.reader.place)
            clean = jnp.asarray(cut.value)
            losses = partial(
                _losses, first.lm, cut, tokens, keep, underflow=quirks.kl_underflow
            )
            at_once = max(_STREAM_BYTES // clean.nbytes, 1)
            for start in range(0, len(each), at_once):
                some = each[start : start + at_once]
                parts = [_splice(s.reader, clean, keep, limit) for s, _ in some]
                values = [value for value, _, _ in parts]
                if start:
                    found = losses(values)[1:]
                else:  # the pass with nothing in its place serves all arms
                    one, zero, *found = losses([jnp.zeros_like(clean), *values])
                    base.append([one, zero])
                for (_, tally), part, of_it in zip(some, parts, found, strict=True):
                    tally.add(part[1], of_it, part[2])
            bar.update(count)
    return [
        _result(subject, tally, base, quirks)
        for subject, tally in zip(subjects, tallies, strict=True)
    ]


def _described(subjects: Sequence[Subject]) -> str:
    n, n_tokens = len(subjects), subjects[0].tokens.size
    return f"core of {n} arm{'s' * (n > 1)} over {n_tokens:,} tokens"


def ordinary_limit(subject: Subject) -> float:
    """The norm up to which a row is ordinary: `ORDINARY_MEDIANS` times the median norm
    of the rows x in the first contexts."""
    some = subject._replace(tokens=subject.tokens[:_MEDIAN_CONTEXTS])
    norms = []
    for tokens, keep, _ in some.batches():
        values = jnp.asarray(subject.lm.at(tokens, [subject.reader.place])[0])
        x = np.asarray(subject.reader.rows(values), np.float64)
        norms.append(np.linalg.norm(x[keep.reshape(-1)], axis=1))
    found = np.concatenate(norms)
    # Where none of these counts, every row is ordinary.
    return ORDINARY_MEDIANS * float(np.median(found)) if len(found) else np.inf


@jit_encode
def _splice(
    reader: Reader,
    clean: Float[Array, "batch time d_model"],
    keep: Bool[Array | np.ndarray, "batch time"],
    limit: Float[Array, ""],
) -> tuple[Float[Array, "batch time d_model"], BatchSums, Float[Array, " d_sae"]]:
    """The activations, reconstructed where a token counts; the sums that measure the
    reconstruction; and in how many contexts each latent fires."""
    x, x_hat, f = _reconstruct(reader, clean)
    shift = clean.reshape(x.shape) - x
    spliced = (x_hat + shift).reshape(clean.shape)
    spliced = jnp.where(keep[..., None], spliced, clean)
    fired = (f > 0).reshape(*keep.shape, -1) & keep[..., None]
    contexts_fired = jnp.sum(jnp.any(fired, axis=1), axis=0)
    return spliced, batch_sums(x, x_hat, f, keep.reshape(-1), limit), contexts_fired


@jax.jit
def _reconstruct(
    reader: Reader, clean: Float[Array, "batch time d_model"]
) -> tuple[Array, Array, Array]:
    """x, x_hat and f of every position, `[batch * time, ...]`, as trained on."""
    x = reader.rows(clean)
    f = reader.encode(x)
    return x, reader.decode(f, rows=x), f


def _losses(
    lm: LanguageModel,
    cut: Cut,
    tokens: Int[np.ndarray, "batch time"],
    keep: Bool[np.ndarray, "batch time"],
    values: Sequence[Float[Array, "batch time d_model"]],
    *,
    underflow: bool,
) -> list[Losses]:
    """The sums over the tokens that count, for the clean pass and for each of `values`
    at the hook. `underflow`: as in SAEBench, the log of a softmax, which underflows."""
    streams = lm.joined(cut, [cut.value, *values])
    unreduced = lm.losses_from(streams, cut.hook.layer, tokens, underflow=underflow)
    each = (np.asarray(a, np.float64) for a in unreduced)
    return [
        Losses(
            ce=np.sum(ce, where=keep[:, :-1]),
            kl=np.sum(kl, where=keep),
            predictions=np.sum(keep[:, :-1], dtype=np.float64),
            positions=np.sum(keep, dtype=np.float64),
        )
        for ce, kl in zip(*each, strict=True)
    ]


def _result(
    subject: Subject, tally: Tally, base: list[list[Losses]], quirks: Quirks
) -> dict[str, Any]:
    clean, ablated = zip(*base, strict=True)
    losses = _loss_metrics(clean, tally.losses, ablated)
    density = tally.reconstruction.density
    # As exported to SAELens: the weights for raw activations.
    raw, _ = sae.fold(subject.run.variables, subject.run.sae)
    per_latent = latent_statistics.per_latent(
        raw["params"],
        density,
        fired=tally.reconstruction.fired,
        contexts_fired=tally.contexts_fired,
    )
    return {
        "metrics": losses
        | tally.reconstruction.metrics(
            mean_in_variance=quirks.mean_in_variance, batch_sums=quirks.batch_sums
        )
        | latent_statistics.averages(per_latent),
        "density_histogram": density_histogram(density),
        "per_latent": latent_statistics.rounded(per_latent),
        "config": subject.config
        | {"quirks": quirks.names, "per_latent_units": latent_statistics.UNITS},
    }


def _loss_metrics(*each: Sequence[Losses]) -> dict[str, float | None]:
    """The metrics, from the sums of the clean, the spliced and the ablated model."""
    totals = [
        Losses(*np.sum(np.asarray(batches, np.float64), axis=0)) for batches in each
    ]
    if not totals[0].predictions:
        raise UserError(_NOTHING)
    clean, spliced, ablated = (float(t.ce / t.predictions) for t in totals)
    _, kl, kl_ablated = (float(t.kl / t.positions) for t in totals)
    kl_score = ratio(kl_ablated - kl, kl_ablated)
    # Happens only with the quirk; SAEBench writes -1 for what is not a number.
    unknown = not np.isfinite([kl, kl_ablated]).all()
    return {
        "ce_loss_score": ratio(ablated - spliced, ablated - clean),
        "ce_loss_without_sae": clean,
        "ce_loss_with_sae": spliced,
        "ce_loss_with_ablation": ablated,
        "kl_div_score": -1.0 if unknown else kl_score,
        "kl_div_with_sae": -1.0 if unknown else kl,
        "kl_div_with_ablation": -1.0 if unknown else kl_ablated,
    }
