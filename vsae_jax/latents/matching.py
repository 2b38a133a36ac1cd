"""Pairs of latents of two autoencoders, one to one, by the cosine of their decoders.

Two runs with the same seed and shapes start from the same decoder rows, whatever their
variant. Their pairs are mostly a latent and itself: the cosines say how far the two
moved apart, not whether two trainings find the same features, which only runs with
different seeds can show. So `Matching` says how the two started and how many pairs have
the same number in both, and holds the cosines that are expected by chance.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from vsae_jax.latents import map_statistics
from vsae_jax.runs import TrainedSAE

# Pairs with a cosine above this are called alike.
CLOSE = 0.7


class Matching(NamedTuple):
    """Two autoencoders' latents, paired.

    partner, cosine `[d_a]`: as `match` returns them.
    chance `[pairs]`: cosines of as many pairs by chance, see `by_chance`.
    start: a sentence about how the two started.
    shared_start: whether both started from the same decoder rows; None if not known.
    """

    partner: Int[np.ndarray, " d_a"]
    cosine: Float[np.ndarray, " d_a"]
    chance: Float[np.ndarray, " pairs"]
    start: str
    shared_start: bool | None

    @property
    def of_pairs(self) -> Float[np.ndarray, " pairs"]:
        """The cosines of the latents that have a partner."""
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

    These are the pairs of alive latents with the largest sum of cosines (the assignment
    problem, solved exactly), not each latent's nearest, which many could share.
    """
    partner, cosine = np.full(len(w_a), -1), np.zeros(len(w_a))
    a, b = np.flatnonzero(alive_a), np.flatnonzero(alive_b)
    cosines = unit_rows(w_a[a]) @ unit_rows(w_b[b]).T
    # Half a second, which commands that match nothing need not wait.
    from scipy.optimize import linear_sum_assignment

    i, j = linear_sum_assignment(cosines, maximize=True)
    partner[a[i]], cosine[a[i]] = b[j], cosines[i, j]
    return partner, cosine


def by_chance(
    w_a: Float[np.ndarray, "d_a d_model"], w_b: Float[np.ndarray, "d_b d_model"]
) -> Float[np.ndarray, " pairs"]:
    """The cosines expected of autoencoders that share nothing but the space: those of
    as many random directions as each has rows, with the second moments of those rows,
    matched in the same way. (Uniformly random directions would set the level too low:
    activations, and so decoder rows, fill some dimensions more than others.)"""
    rng = np.random.default_rng(0)
    mixed = [rng.standard_normal((len(w), len(w))) @ unit_rows(w) for w in (w_a, w_b)]
    alive_a, alive_b = (np.ones(len(w), bool) for w in mixed)
    partner, cosine = match(*mixed, alive_a=alive_a, alive_b=alive_b)
    return cosine[partner >= 0]


def describe(m: Matching) -> list[str]:
    """Paragraphs about the pairs: their cosines, those expected by chance, and what
    they mean given how the two runs started."""
    if not len(m.of_pairs):
        return ["No pair: in one of the two no latent fires."]
    same = float((m.partner == np.arange(len(m.partner)))[m.partner >= 0].mean())
    lines = [
        f"{len(m.of_pairs):,} pairs, one to one, chosen for the largest sum of cosines "
        f"among latents that fire (Hungarian assignment). {_spread(m.of_pairs)}.",
        f"By chance: {_spread(m.chance).lower()}. That is for as many random "
        "directions, spread over the dimensions as each run's own decoder rows are, "
        "and matched in the same way.",
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
    """A sentence, and whether both started from the same decoder rows, which depend
    only on the seed and the shape."""
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
    """The rows at norm 1, in float64."""
    return map_statistics.unit_rows(w.astype(np.float64))
