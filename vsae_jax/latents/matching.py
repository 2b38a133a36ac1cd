"""Pairs of latents of two autoencoders, one to one, by the cosine of their decoders."""

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.optimize import linear_sum_assignment


def match(
    w_a: Float[np.ndarray, "d_a d_model"],
    w_b: Float[np.ndarray, "d_b d_model"],
    *,
    alive_a: Bool[np.ndarray, " d_a"],
    alive_b: Bool[np.ndarray, " d_b"],
) -> tuple[Int[np.ndarray, " d_a"], Float[np.ndarray, " d_a"]]:
    """Each latent's partner (-1: none) and the cosine of the two decoder rows.

    The pairs of alive latents with the largest sum of cosines (the assignment problem,
    solved exactly), not the nearest row of each, which many could share.
    """
    partner, cosine = np.full(len(w_a), -1), np.zeros(len(w_a))
    a, b = np.flatnonzero(alive_a), np.flatnonzero(alive_b)
    cosines = _unit(w_a[a]) @ _unit(w_b[b]).T
    i, j = linear_sum_assignment(cosines, maximize=True)
    partner[a[i]], cosine[a[i]] = b[j], cosines[i, j]
    return partner, cosine


def _unit(w: np.ndarray) -> np.ndarray:
    w = w.astype(np.float64)
    return w / np.maximum(np.linalg.norm(w, axis=1, keepdims=True), 1e-30)
