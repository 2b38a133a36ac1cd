"""First-letter absorption: does a word's latent take over from its letter's?

docs/saebench.md 6. A linear probe finds each letter's direction d in the residual
stream, a sparse probe the latents that stand for the letter ("split latents"). Where
these stay silent on a word that the probe recognises, and others that point along d
make up for them, the feature was absorbed.

Everything is seeded and the words are sorted, where SAEBench's are in no order.
"""

import importlib.util
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Float, Int

from vsae_jax import lm
from vsae_jax.config import EvalConfig
from vsae_jax.evals import Subject, first_letter
from vsae_jax.evals.encoding import encode_residuals
from vsae_jax.evals.first_letter import LETTERS, Words
from vsae_jax.evals.probes import Probe, Recipe, fit_outputs
from vsae_jax.evals.quirks import Quirks
from vsae_jax.evals.sampling import generator
from vsae_jax.system import progress
from vsae_jax.system.errors import UserError, missing_extra

LETTER_PROBE = Recipe(
    lr=1e-2, batch_size=64, epochs=50, weight_decay=1e-4, coupled=True, end_lr=1e-5
)
SPARSE_PROBE = Recipe(
    lr=1e-2,
    batch_size=4096,
    epochs=50,
    l1=0.01,
    weight_decay=1e-6,
    coupled=True,
    end_lr=1e-5,
)
MOST_SPLIT, F1_JUMP = 10, 0.03
LEAST_F1, LEAST_LETTERS = 0.6, 20
ABSORBERS, LEAST_COSINE, LEAST_SHARE, FULL_COSINE = 3, 0.1, 0.4, 0.025
_SILENT = 1e-8


class Prepared(NamedTuple):
    """What all autoencoders of a model share.

    f1: of the letter probe on test words. scored: test words that it recognises, with
    new prompts.
    """

    train: Words
    test: Words
    probe: Probe
    f1: Float[np.ndarray, " 26"]
    scored: Words | None

    @property
    def letters(self) -> list[int]:
        """Letters that the model encodes."""
        return np.flatnonzero(self.f1 > LEAST_F1).tolist()


def check(subjects: Sequence[Subject], config: EvalConfig) -> None:
    """Refuses what would end without a number: scikit-learn that is not there, prompts
    longer than the model's contexts. Says so where it has too few words, and how many
    prompts there will be."""
    if importlib.util.find_spec("sklearn") is None:
        raise missing_extra("scikit-learn", extra="analysis")
    language_model = subjects[0].lm
    tokenizer = lm.load_tokenizer(language_model.files)
    every = first_letter.alphabetic_words(tokenizer)
    words = first_letter.drawn(every, config.absorption_words, config.seed)
    if first_letter.too_few(words):
        print(
            f"note: absorption will be refused: the vocabulary has {len(words)} words "
            "of one token"
        )
        return
    longest = first_letter.prompt_length(words, tokenizer)
    if language_model.max_positions and longest > language_model.max_positions:
        raise UserError(
            f"--evals=absorption reads prompts of {longest} tokens and "
            f"--model={language_model.name} has {language_model.max_positions} "
            "positions; leave absorption out"
        )
    print(
        f"absorption: {len(words):,} of {len(every):,} words; one prompt of {longest} "
        "tokens each, another for those that are scored (--absorption_words)"
    )


def run(
    subjects: Sequence[Subject], config: EvalConfig, quirks: Quirks
) -> list[dict[str, Any]]:
    """`{"metrics", "per_letter", "config"}` of each; without metrics and with a
    `reason` where the model does not encode enough letters. The subjects share their
    language model and layer."""
    prepared = _prepare(subjects[0], config)
    results = []
    with progress.bar(len(subjects), unit="autoencoders") as bar:
        for subject in subjects:
            result = _score(subject, prepared, config, quirks)
            about = subject.config | {
                "tokens_from": "the vocabulary's words",
                "n_tokens": None,
                "n_contexts": None,
                "n_words": len(prepared.train.words) + len(prepared.test.words),
                "eval_seed": config.seed,
                "quirks": quirks.names,
            }
            results.append(result | {"config": about})
            bar.update(1)
    return results


def word_scores(
    f: Float[np.ndarray, "words d_sae"],
    cosines: Float[np.ndarray, " d_sae"],
    projection: Float[np.ndarray, " words"],
    split: Int[np.ndarray, " split"],
) -> tuple[Float[np.ndarray, " words"], Bool[np.ndarray, " words"]]:
    """Absorption fraction, and whether one latent absorbs it all, of each word.

    Args:
      f: latents where decoder rows have norm 1.
      cosines: of decoder rows with the letter's direction.
      projection: of x on that direction.
      split: the letter's own latents.
    """
    a = f * cosines[None, :]
    main = a[:, split].sum(axis=1)
    others = (cosines >= LEAST_COSINE) & ~np.isin(np.arange(len(cosines)), split)
    largest = -np.sort(-np.maximum(a[:, others], 0), axis=1)[:, :ABSORBERS]
    absorbing = largest.sum(axis=1)
    made_up = np.minimum(absorbing, projection - main)
    with np.errstate(divide="ignore", invalid="ignore"):
        share = absorbing / projection
        fraction = np.where(main <= 0, 1.0, made_up / (made_up + main))
        top = a.argmax(axis=1)
        top_share = a[np.arange(len(a)), top] / projection
    nothing = (main >= projection) | ~(share >= LEAST_SHARE)
    silent = np.all(f[:, split] < _SILENT, axis=1)
    full = silent & (cosines[top] >= FULL_COSINE) & (projection >= 0)
    return np.where(nothing, 0.0, fraction), full & (top_share >= LEAST_SHARE)


def split_latents(
    f1: Sequence[float], ranked: Int[np.ndarray, " latents"]
) -> Int[np.ndarray, " split"]:
    """The first latent, and the next ones as long as each raises F1 by over 0.03."""
    best, count = f1[0], 1
    for k, value in enumerate(f1[1:], start=2):
        if value <= best + F1_JUMP:
            break
        best, count = value, k
    return ranked[:count]


def _prepare(subject: Subject, config: EvalConfig) -> Prepared:
    tokenizer = lm.load_tokenizer(subject.lm.files)
    words = first_letter.alphabetic_words(tokenizer)
    words = first_letter.drawn(words, config.absorption_words, config.seed)
    halves = first_letter.split(words, generator(config.seed, "absorption", "split"))
    empty = Words([], np.zeros(0, int), np.zeros((0, subject.lm.d_model), np.float32))
    if first_letter.too_few(words):
        probe = Probe(*(np.zeros((0, 26)), np.zeros(26)))
        return Prepared(empty, empty, probe, np.zeros(26), None)
    train, test = (
        first_letter.read_words(
            subject, tokenizer, half, half, generator(config.seed, "absorption", name)
        )
        for name, half in zip(("train", "test"), halves, strict=True)
    )
    key = jax.random.key(config.seed)
    probe = fit_outputs(train.x, _one_hot(train), recipe=LETTER_PROBE, key=key)
    probe = Probe(*(np.asarray(a) for a in probe))
    logits = test.x @ probe.w + probe.b
    f1 = np.array([_f1(logits[:, i] > 0, test.letters == i) for i in range(26)])
    recognised = logits[np.arange(len(logits)), test.letters] > 0
    some = [w for w, yes in zip(test.words, recognised, strict=True) if yes]
    scored = None
    if np.sum(f1 > LEAST_F1) >= LEAST_LETTERS:
        rng = generator(config.seed, "absorption", "scored")
        scored = first_letter.read_words(subject, tokenizer, some, words, rng)
    return Prepared(train, test, probe, f1, scored)


def _score(
    subject: Subject, prepared: Prepared, config: EvalConfig, quirks: Quirks
) -> dict[str, Any]:
    per_letter: dict[str, dict[str, float]] = {
        LETTERS[i]: {"f1_probe": float(f1)} for i, f1 in enumerate(prepared.f1)
    }
    if prepared.scored is None:
        reason = (
            f"{len(prepared.letters)} letters have a probe F1 above {LEAST_F1} and "
            f"{LEAST_LETTERS} are needed: the model does not encode spelling here"
        )
        return {"metrics": {}, "per_letter": per_letter, "reason": reason}
    encoded = [
        encode_residuals(subject, words.x, stored_norms=quirks.stored_norms)
        for words in (prepared.train, prepared.test, prepared.scored)
    ]
    (train, _), (test, _), (scored, directions) = encoded
    unit = directions / np.maximum(np.linalg.norm(directions, axis=1), 1e-30)[:, None]
    key = jax.random.key(config.seed)
    labels = _one_hot(prepared.train)
    sparse = fit_outputs(train, labels, recipe=SPARSE_PROBE, key=key)
    weights = np.asarray(sparse.w)
    for i in prepared.letters:
        rows = prepared.scored.letters == i
        if not rows.any():
            continue
        ranked = np.argsort(-weights[:, i], kind="stable")[:MOST_SPLIT]
        f1 = _f1_by_k(train, test, ranked, prepared, i)
        split = split_latents(f1, ranked)
        d = prepared.probe.w[:, i] / np.linalg.norm(prepared.probe.w[:, i])
        projection = prepared.scored.x[rows] @ d
        fraction, full = word_scores(scored[rows], unit @ d, projection, split)
        per_letter[LETTERS[i]] |= {
            "mean_absorption_fraction": float(fraction.mean()),
            "full_absorption_rate": float(full.mean()),
            "num_full_absorption": int(full.sum()),
            "num_probe_true_positives": int(rows.sum()),
            "num_split_features": len(split),
        }
    return {"metrics": _metrics(per_letter), "per_letter": per_letter}


def _f1_by_k(
    train: Float[np.ndarray, "words d_sae"],
    test: Float[np.ndarray, "words d_sae"],
    ranked: Int[np.ndarray, " latents"],
    prepared: Prepared,
    letter: int,
) -> list[float]:
    """Test F1 of logistic regressions on the first 1, 2, ... ranked latents, up to the
    first that does not count as a split."""
    from sklearn.linear_model import LogisticRegression

    wanted, truth = prepared.train.letters == letter, prepared.test.letters == letter
    found: list[float] = []
    for k in range(1, len(ranked) + 1):
        probe = LogisticRegression(max_iter=500, class_weight="balanced")
        probe.fit(train[:, ranked[:k]], wanted)
        f1 = _f1(probe.decision_function(test[:, ranked[:k]]) > 0, truth)
        found.append(f1)
        if k > 1 and f1 <= found[-2] + F1_JUMP:
            break
    return found


def _metrics(per_letter: dict[str, dict[str, float]]) -> dict[str, float | None]:
    scored = [each for each in per_letter.values() if "num_split_features" in each]
    names = {
        "absorption_fraction_score": "mean_absorption_fraction",
        "full_absorption_score": "full_absorption_rate",
        "num_split_features": "num_split_features",
    }
    metrics: dict[str, float | None] = {}
    for name, column in names.items():
        values = [each[column] for each in scored]
        spread = statistics.stdev(values) if len(values) > 1 else None
        metrics[f"mean_{name}"] = statistics.fmean(values) if values else None
        metrics[f"std_dev_{name}"] = spread
    return metrics


def _one_hot(words: Words) -> Float[np.ndarray, "words 26"]:
    return np.eye(26, dtype=np.float32)[words.letters]


def _f1(found: Bool[np.ndarray, " n"], truth: Bool[np.ndarray, " n"]) -> float:
    """2 TP / (2 TP + FP + FN); 0 of nothing."""
    both = 2 * int(np.sum(found & truth))
    return both / max(int(np.sum(found)) + int(np.sum(truth)), 1)
