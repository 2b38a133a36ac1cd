"""Pairs of latents of two autoencoders, one to one, by the cosine of their decoders.

Two runs with the same seed and shapes start from the same decoder rows, whatever their
variant. Pairs of such runs are mostly a latent and itself: their cosines say how far
the two moved apart, not whether two trainings find the same features, which only runs
of different seeds can show. `Matching` therefore says how the two started and how many
pairs have the same number in both, and holds the cosines that chance gives.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.optimize import linear_sum_assignment

from vsae_jax.runs import TrainedSAE

# Pairs above it are called alike.
CLOSE = 0.7


class Matching(NamedTuple):
    """Two autoencoders' latents, paired.

    partner, cosine `[d_a]`: as `match` returns them.
    chance `[pairs]`: cosines of as many pairs by chance, see `by_chance`.
    start: what is known of how the two started, a sentence.
    shared_start: whether from the same decoder rows; None where it is not known.
    """

    partner: Int[np.ndarray, " d_a"]
    cosine: Float[np.ndarray, " d_a"]
    chance: Float[np.ndarray, " pairs"]
    start: str
    shared_start: bool | None

    @property
    def of_pairs(self) -> Float[np.ndarray, " pairs"]:
        """The cosines of those that have a partner."""
        return self.cosine[self.partner >= 0]


def compare(
    a: TrainedSAE,
    b: TrainedSAE,
    *,
    alive_a: Bool[np.ndarray, " d_a"],
    alive_b: Bool[np.ndarray, "b"],
) -> Matching:
    """The alive latents of two runs that read the same activations, matched."""
    w_a, w_b = (np.asarray(run.variables["params"]["w_dec"]) for run in (a, b))
    partner, cosine = match(w_a, w_b, alive_a=alive_a, alive_b=alive_b)
    start, shared = _start(a, b)
    return Matching(
        partner, cosine, by_chance(w_a[alive_a], w_b[alive_b]), start, shared
    )


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
    cosines = unit_rows(w_a[a]) @ unit_rows(w_b[b]).T
    i, j = linear_sum_assignment(cosines, maximize=True)
    partner[a[i]], cosine[a[i]] = b[j], cosines[i, j]
    return partner, cosine


def by_chance(
    w_a: Float[np.ndarray, "d_a d_model"], w_b: Float[np.ndarray, "d_b d_model"]
) -> Float[np.ndarray, " pairs"]:
    """Cosines that autoencoders with nothing in common but the space would show: as
    many random directions as each has rows, with the second moments of those rows,
    matched in the same way. (Directions uniform on the sphere would put chance too low:
    activations, and so decoder rows, fill some dimensions more than others.)"""
    rng = np.random.default_rng(0)
    mixed = [rng.standard_normal((len(w), len(w))) @ unit_rows(w) for w in (w_a, w_b)]
    alive_a, alive_b = (np.ones(len(w), bool) for w in mixed)
    partner, cosine = match(*mixed, alive_a=alive_a, alive_b=alive_b)
    return cosine[partner >= 0]


def describe(m: Matching) -> list[str]:
    """What the pairs say, in paragraphs: their cosines, those by chance, and what the
    two runs' starts make of them."""
    if not len(m.of_pairs):
        return ["No pair: in one of the two no latent fires."]
    same = float((m.partner == np.arange(len(m.partner)))[m.partner >= 0].mean())
    lines = [
        f"{len(m.of_pairs):,} pairs, one to one, chosen for the largest sum of cosines "
        f"among latents that fire (Hungarian assignment). {_spread(m.of_pairs)}.",
        f"By chance: {_spread(m.chance).lower()}. That is of as many random "
        "directions, spread over the dimensions as each one's own decoder rows are and "
        "matched in the same way.",
        f"{m.start} {100 * same:.1f} % of the pairs have the same number in both.",
    ]
    if m.shared_start:
        lines[2] += (
            " So the cosines say how far the two moved apart, not whether they found "
            "the same features. To ask that, compare runs of different seeds (train "
            "with --seed=0,1)."
        )
    return lines


def _spread(cosines: Float[np.ndarray, " pairs"]) -> str:
    return (
        f"Median {np.median(cosines):.3f}; "
        f"{100 * (cosines > CLOSE).mean():.1f} % above {CLOSE}"
    )


def _start(a: TrainedSAE, b: TrainedSAE) -> tuple[str, bool | None]:
    """The sentence, and whether both began with the same decoder rows: these depend on
    the seed and the shape alone."""
    if a.train is None or b.train is None:
        return "How they started is not known.", None
    if a.train.fork_from or b.train.fork_from:
        return "One went on from another run, so its start is not known here.", None
    if a.sae.d_sae != b.sae.d_sae:
        which = f"{a.sae.d_sae:,} and {b.sae.d_sae:,} latents"
    elif a.train.seed != b.train.seed:
        which = f"seeds {a.train.seed} and {b.train.seed}"
    else:
        return f"Both started from the same weights (seed {a.train.seed}).", True
    return f"They started from different weights ({which}).", False


def unit_rows(w: Float[np.ndarray, "rows d"]) -> Float[np.ndarray, "rows d"]:
    """The rows, each of norm 1, in float64."""
    w = w.astype(np.float64)
    return w / np.maximum(np.linalg.norm(w, axis=1, keepdims=True), 1e-30)
