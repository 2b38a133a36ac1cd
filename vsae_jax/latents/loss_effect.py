"""What the language model loses without a latent, measured through the model.

In each of a latent's strongest contexts, f_i w_dec_i is subtracted where the
autoencoder reads, at every position (its error and the other latents stay), and the
blocks above run on that. The effect at a token is the rise of -log p(token | those
before it), in nats: above 0, the latent helped to predict that token.
"""

from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, Int

from vsae_jax.lm import identity
from vsae_jax.system import progress

if TYPE_CHECKING:
    from vsae_jax.latents.feature_tables import Source

CONTEXTS = 5
_AT_ONCE = 16


def loss_effects(
    source: "Source", arrays: dict[str, Any], *, reach: int
) -> Float[np.ndarray, "d_sae contexts width"]:
    """The effect at the tokens of `top_ids` in the 5 strongest contexts; NaN where
    there is no token, or none before it."""
    context = arrays["top_context"][:, :CONTEXTS]
    position = arrays["top_position"][:, :CONTEXTS]
    width = 2 * reach + 1
    result = np.full((*context.shape, width), np.nan, np.float32)
    length = source.activations.manifest.context_length
    pairs = np.argwhere(context >= 0)
    with progress.bar(len(pairs), unit="contexts") as bar:
        for start in range(0, len(pairs), _AT_ONCE):
            some = pairs[start : start + _AT_ONCE]
            latent, place = some.T
            effect = of_contexts(source, latent, context[latent, place])
            at = position[latent, place][:, None] + np.arange(-reach, reach + 1)
            inside = (at >= 0) & (at < length)
            picked = np.take_along_axis(effect, at.clip(0, length - 1), 1)
            result[latent, place] = np.where(inside, picked, np.nan)
            bar.update(len(some))
    return result


def of_contexts(
    source: "Source", latent: Int[np.ndarray, " n"], context: Int[np.ndarray, " n"]
) -> Float[np.ndarray, "n time"]:
    """The effect of subtracting latent i in context i, at each token of the context;
    NaN at the first, which nothing predicts."""
    n, filled = len(latent), np.resize(np.arange(len(latent)), _AT_ONCE)
    # Always the same number of contexts, so that there is one compilation.
    latent, context = latent[filled], context[filled]
    tokens = np.concatenate([source.activations.tokens(c, c + 1) for c in context])
    delta = _contributions(source, latent, context)
    place = source.run.reader.place
    clean, without = source.lm.loss(
        tokens,
        layer=place.layer,
        site=place.site,
        splices=[identity, lambda x: x - delta],
    )
    effect = np.full(tokens.shape, np.nan, np.float32)
    effect[:, 1:] = np.asarray(without) - np.asarray(clean)
    return effect[:n]


def _contributions(
    source: "Source", latent: np.ndarray, context: np.ndarray
) -> Float[np.ndarray, "n time d_model"]:
    """f_i w_dec_i in units of x at every position; 0 where there is no row."""
    activations, reader = source.activations, source.run.reader
    rows, m = activations.rows_per_context, activations.manifest
    x = np.concatenate([activations.rows(c * rows, (c + 1) * rows) for c in context])
    f = np.asarray(reader.encode(x)).reshape(len(context), rows, -1)
    own = np.take_along_axis(f, latent[:, None, None], 2)
    scale = np.asarray(reader.row_scale(x)).reshape(len(context), rows, 1)
    delta = own * reader.directions[latent][:, None, :] * scale
    return np.pad(delta, ((0, 0), (m.dropped_positions, 0), (0, 0)))
