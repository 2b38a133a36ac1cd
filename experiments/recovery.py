"""How well the latents of an autoencoder match features that are known.

Cosines are signed: a latent adds its decoder row where it fires, so one that points
against a feature has not found it. A latent is alive if it is above 0 on some row.
"""

import numpy as np
from jaxtyping import Bool, Float
from scipy.optimize import linear_sum_assignment

from vsae_jax.latents.matching import CLOSE

# From which cosine a latent is a feature, and from which it holds a part of one.
FOUND, PART = 0.9, 0.4


def recovery(
    w_dec: Float[np.ndarray, "d_sae d_model"],
    directions: Float[np.ndarray, "n_features d_model"],
    *,
    fires: Bool[np.ndarray, "rows d_sae"],
    truly: Bool[np.ndarray, "rows n_features"],
) -> dict[str, float]:
    """All measures of an autoencoder, by name, over its alive latents.

    alive: share of the latents.
    f1: mean over features of how well the firing of the latent that is matched with it
      tells its own (harmonic mean of precision and recall); 0 where none is matched.
    The others are those of `of_directions`.
    """
    alive = fires.any(0)
    found = of_directions(w_dec[alive], directions)
    latents, features = assign(_cosines(w_dec[alive], directions))
    f1 = _f1(fires[:, alive][:, latents], truly[:, features])
    found["f1"] = float(f1.sum() / len(directions))
    return {"alive": float(alive.mean())} | found


def of_directions(
    latents: Float[np.ndarray, "latents d_model"],
    directions: Float[np.ndarray, "n_features d_model"],
) -> dict[str, float]:
    """Measures of the decoder's rows alone; 0 where there are no latents.

    recovered: share of features whose latent, matched one to one, has cosine > 0.9.
    mean_max_cosine: mean over features of the nearest latent's cosine.
    duplicates: latents beyond the first that are the same feature (it is their
      nearest, cosine > 0.9), as a share of the latents.
    merged: latents with cosine > 0.4 to a feature and, what they have of that feature
      taken away, to another one too, as a share of the latents.
    """
    if not len(latents):
        names = ("recovered", "mean_max_cosine", "duplicates", "merged")
        return dict.fromkeys(names, 0.0)
    cosine = _cosines(latents, directions)
    matched = cosine[assign(cosine)]
    nearest = cosine.argmax(1)[cosine.max(1) > FOUND]
    return {
        "recovered": float((matched > FOUND).sum() / len(directions)),
        "mean_max_cosine": float(cosine.max(0).mean()),
        "duplicates": (len(nearest) - len(set(nearest.tolist()))) / len(latents),
        "merged": float(is_merged(latents, directions).mean()),
    }


def returning(
    latents: Float[np.ndarray, "latents d_model"],
    others: Float[np.ndarray, "others d_model"],
    directions: Float[np.ndarray, "n_features d_model"],
) -> dict[str, float | None]:
    """Whether the latents of one run come back in another, and whether they are true.

    A latent returns if the other run's latent that it is matched with, one to one, has
    cosine > 0.7 with it. It is a feature if its nearest one has cosine > 0.9.

    returns: share of the latents that return.
    returning_true, returning_near: of those, the share that is a feature, and the share
      whose nearest feature has cosine > 0.7.
    true_return, false_return: of the latents that are a feature, and of those that are
      none, the share that returns.
    None is the share of nothing.
    """
    cosine = _cosines(latents, others)
    found, partners = assign(cosine)
    back = np.zeros(len(latents), bool)
    back[found] = cosine[found, partners] > CLOSE
    nearest = _cosines(latents, directions).max(1, initial=-1)
    true = nearest > FOUND
    shares = {
        "returns": back,
        "returning_true": true[back],
        "returning_near": nearest[back] > CLOSE,
        "true_return": back[true],
        "false_return": back[~true],
    }
    return {name: float(x.mean()) if len(x) else None for name, x in shares.items()}


def assign(cosine: Float[np.ndarray, "latents features"]) -> tuple[np.ndarray, ...]:
    """Latents and the features that they are matched with, one to one, so that the sum
    of the cosines is the largest."""
    return linear_sum_assignment(cosine, maximize=True)


def is_merged(
    latents: Float[np.ndarray, "latents d_model"],
    directions: Float[np.ndarray, "n_features d_model"],
) -> Bool[np.ndarray, " latents"]:
    """Which latents are mixtures. Random directions are not orthogonal, so a latent
    that is one feature has a cosine with others as well: what it has of the nearest is
    taken away before the second is looked for."""
    unit, true = _unit(latents), _unit(directions)
    cosine = unit @ true.T
    first = cosine.max(1)
    rest = unit - first[:, None] * true[cosine.argmax(1)]
    return (first > PART) & ((rest @ true.T).max(1) > PART)


def _f1(
    fires: Bool[np.ndarray, "rows pairs"], truly: Bool[np.ndarray, "rows pairs"]
) -> Float[np.ndarray, " pairs"]:
    both = (fires & truly).sum(0)
    return 2 * both / np.maximum(fires.sum(0) + truly.sum(0), 1)


def _cosines(
    latents: Float[np.ndarray, "latents d_model"],
    directions: Float[np.ndarray, "n_features d_model"],
) -> Float[np.ndarray, "latents n_features"]:
    return _unit(latents) @ _unit(directions).T


def _unit(rows: Float[np.ndarray, "rows d"]) -> Float[np.ndarray, "rows d"]:
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.maximum(norms, 1e-30)
