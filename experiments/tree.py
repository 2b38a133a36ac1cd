"""Whether a nested decoder keeps a parent's latent where its children fire.

    python -m experiments.tree

The toy model of Nabeshima 2024 ("Matryoshka Sparse Autoencoders"), an author of
Bussmann et al. 2025. From the code, github.com/noanabeshima/matryoshka-saes: 20
orthogonal features of norms 1 + 0.05 N(0, 1); three parents that fire on 15 % of rows,
each with three children of which at most one fires, each on 20 % of the parent's rows;
eight others that fire on 5 %; 20 latents; batches of 200 rows; and latents matched with
features by what they fire on. Theirs is a ReLU with an L1 whose weight follows an L0 of
1.23, each step draws ten prefixes, and latents are sorted by how much they reconstruct;
ours has fixed prefixes and is not sorted. Ours alone: the weight of L1, at which the
nested decoder has the features' L0; 10,000 steps for 40,000; a learning rate of 0.003
for 0.03; and batch_topk, whose k must be a whole number, so 1.
"""

from typing import Any

import numpy as np
from jaxtyping import Bool, Float

import vsae_jax
from benchmarks.family import on_rows
from experiments.recovery import assign
from experiments.subspaces import SEEDS, Values, table
from vsae_jax.runs.series import markdown

# A parent's children are the three features after it.
PARENTS, N_CHILDREN, N_FEATURES = (0, 4, 8), 3, 20
PARENT_RATE, CHILD_RATE, OTHER_RATE = 0.15, 0.2, 0.05
ARMS: dict[str, dict[str, Any]] = {
    "relu, L1": {"variant": "relu", "l1": 0.1},
    "relu, L1, nested": {
        "variant": "relu",
        "l1": 0.1,
        "prefixes": "1/16:1/8:1/4:1/2",
    },
    "batch_topk": {"variant": "batch_topk", "k": 1},
    "matryoshka": {"variant": "matryoshka", "k": 1},
}


def main() -> None:
    """Trains some seeds, and prints a table of means and standard deviations."""
    found = {
        name: [of(seed, **flags) for seed in SEEDS] for name, flags in ARMS.items()
    }
    print(markdown(table(found)))


def of(seed: int, **flags: Any) -> Values:
    """What an autoencoder of these flags makes of the tree."""
    rng = np.random.default_rng(seed)
    directions = np.linalg.qr(rng.normal(size=(N_FEATURES, N_FEATURES)))[0]
    fires = firings(400_000, rng, OTHER_RATE)
    norms = 1 + 0.05 * rng.normal(size=(N_FEATURES, 1))
    x = (fires @ (norms * directions)).astype(np.float32)
    fit = vsae_jax.fit(
        x,
        preset="baseline",
        input_scale="none",
        d_sae=N_FEATURES,
        lr=3e-3,
        steps=10_000,
        batch_size=200,
        seed=seed,
        progress=False,
        **flags,
    )
    held_out = slice(-10_000, None)
    reader = fit.sae.reader
    point = on_rows(reader, x[held_out], seed=seed)
    w_dec = np.asarray(reader.variables["params"]["w_dec"])
    f = np.asarray(reader.encode(x[held_out]))
    return {
        "L0 of the features": float(fires[held_out].sum(1).mean()),
        "L0": point.l0,
        **of_children(w_dec, f, directions, fires[held_out]),
        "explained variance": point.explained_variance,
    }


def firings(
    n: int, rng: np.random.Generator, other_rate: float = OTHER_RATE
) -> Bool[np.ndarray, "n features"]:
    """Which features fire on `n` rows."""
    fires = rng.random((n, N_FEATURES)) < other_rate
    for parent in PARENTS:
        on = rng.random(n) < PARENT_RATE
        fires[:, parent] = on
        # From N_CHILDREN on there is none.
        child = (rng.random(n) // CHILD_RATE).astype(int)
        fires[:, children(parent)] = on[:, None] & np.equal.outer(
            child, range(N_CHILDREN)
        )
    return fires


def children(parent: int) -> slice:
    """A parent's children among the features."""
    return slice(parent + 1, parent + 1 + N_CHILDREN)


def of_children(
    w_dec: Float[np.ndarray, "latents d_model"],
    f: Float[np.ndarray, "rows latents"],
    directions: Float[np.ndarray, "features d_model"],
    fires: Bool[np.ndarray, "rows features"],
) -> Values:
    """Cosines of the children's latents, and how often a child silences its parent's.

    A feature's latent is the one that fires with it: latents, over their largest value,
    are matched one to one with features so that their summed products are the largest.
    """
    likeness = (f / np.maximum(f.max(0), 1e-10)).T @ fires
    latents, features = assign(likeness)
    latent_of = latents[np.argsort(features)]
    w_dec, f = w_dec[latent_of], f[:, latent_of]
    norms = np.linalg.norm(w_dec, axis=1, keepdims=True)
    cosine = w_dec / np.maximum(norms, 1e-30) @ directions.T
    own = [np.diag(cosine)[children(p)] for p in PARENTS]
    of_parent = [cosine[children(p), p] for p in PARENTS]
    silent = [f[fires[:, children(p)].any(1), p] == 0 for p in PARENTS]
    return {
        "child and its feature": float(np.mean(own)),
        "child and its parent": float(np.mean(of_parent)),
        "parent silent where a child fires": float(np.mean(np.concatenate(silent))),
    }


if __name__ == "__main__":
    main()
