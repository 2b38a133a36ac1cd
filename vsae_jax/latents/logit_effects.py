"""Which tokens a latent's direction makes likely: its decoder row passed through the
final norm and the unembedding, without the blocks in between (the direct path).

    effect(d) = (U(c d) - U(-c d)) / 2,     U = unembedding of the final norm

c is so large that the norm's epsilon does not matter, and the two signs cancel its
bias. For a LayerNorm this is W_U (g * (d - mean d) / std d): logits per unit of a
normalised residual that points along d. The mean over the vocabulary is subtracted, as
it changes no probability. A decoder row's length makes no difference. Neither does the
site, since what attention or an MLP adds enters the stream as it is.
"""

from typing import Any

import numpy as np
from jaxtyping import Float

from vsae_jax.lm import LanguageModel

_AT_ONCE, _LARGE = 256, 1e4
STRONGEST, BINS = 10, 50


def logit_effects(
    lm: LanguageModel, w_dec: Float[np.ndarray, "d_sae d_model"]
) -> dict[str, np.ndarray]:
    """Each row's 10 largest and smallest effects, the ids of those tokens, and a
    histogram of all effects over 50 equal bins from the smallest to the largest."""
    parts = [
        _tables(effects(lm, w_dec[start : start + _AT_ONCE]))
        for start in range(0, len(w_dec), _AT_ONCE)
    ]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def effects(
    lm: LanguageModel, directions: Float[np.ndarray, "n d_model"]
) -> Float[np.ndarray, "n vocab"]:
    """effect(d) of each row; the mean over the vocabulary is 0."""
    norm = np.linalg.norm(directions, axis=1, keepdims=True)
    d = _LARGE * directions / np.maximum(norm, 1e-30) * np.sqrt(lm.d_model)
    # Always the same number of rows, so that there is one compilation.
    filled = np.zeros((_AT_ONCE, 1, lm.d_model), np.float32)
    filled[: len(d), 0] = d
    last = lm.n_layers - 1
    plus, minus = lm.logits_from(filled, last), lm.logits_from(-filled, last)
    both = (np.asarray(plus) - np.asarray(minus))[: len(d), 0] / 2
    return both - both.mean(1, keepdims=True)


def _tables(effect: Float[np.ndarray, "n vocab"]) -> dict[str, Any]:
    count = min(STRONGEST, effect.shape[1])
    top, bottom = largest(effect, count), largest(-effect, count)
    least = np.take_along_axis(effect, bottom[:, :1], 1)
    most = np.take_along_axis(effect, top[:, :1], 1)
    place = (effect - least) / np.maximum(most - least, 1e-30) * BINS
    index = np.minimum(place.astype(np.int64), BINS - 1)
    index += BINS * np.arange(len(effect))[:, None]
    counts = np.bincount(index.ravel(), minlength=BINS * len(effect))
    return {
        "top_logit_tokens": top.astype(np.int32),
        "top_logits": np.take_along_axis(effect, top, 1),
        "bottom_logit_tokens": bottom.astype(np.int32),
        "bottom_logits": np.take_along_axis(effect, bottom, 1),
        "logit_histogram": counts.reshape(-1, BINS),
        "logit_range": np.concatenate([least, most], 1),
    }


def largest(values: Float[np.ndarray, "n vocab"], count: int) -> np.ndarray:
    """The places of each row's `count` largest values, the largest first."""
    some = np.argpartition(-values, count - 1, axis=1)[:, :count]
    order = np.argsort(-np.take_along_axis(values, some, 1), axis=1, kind="stable")
    return np.take_along_axis(some, order, 1)
