"""Whether vaease uses as many latents for a subspace as it has dimensions.

    python -m experiments.subspaces

The linear setting of Lu et al. 2025, with their code's sizes: rows from three subspaces
of 4 of 40 dimensions, 20 latents. As they count, a subspace uses the latents whose
variance there is below 0.05 in the mean. Their encoder has four layers. Ours has one,
which cannot tell x from -x: `absolute` are such rows with absolute amplitudes.
"""

import statistics
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

import vsae_jax
from benchmarks.family import on_rows
from vsae_jax.autoencoder import posterior, sae
from vsae_jax.runs.series import markdown, spread

SEEDS = (0, 1, 2)
Values = dict[str, float]


def main() -> None:
    """Trains some seeds, and prints a table of means and standard deviations."""
    print(markdown(table(subspaces())))


def table(found: dict[str, list[Values]]) -> list[list[str]]:
    """A row a name, of the mean and standard deviation of its seeds."""
    head = ["", *next(iter(found.values()))[0]]
    rows = [head]
    for name, seeds in found.items():
        columns = ([values[c] for values in seeds] for c in head[1:])
        rows.append([name, *(spread(column, digits=2) for column in columns)])
    return rows


def subspaces() -> dict[str, list[Values]]:
    """What vaease makes of either kind of amplitudes, for each seed."""
    kinds: dict[str, Callable[[Any], Any]] = {"normal": lambda z: z, "absolute": abs}
    return {
        name: [_of_subspaces(seed, amplitude) for seed in SEEDS]
        for name, amplitude in kinds.items()
    }


def _of_subspaces(seed: int, amplitude: Callable[[Any], Any]) -> Values:
    rng, d, n, dims = np.random.default_rng(seed), 40, 200_000, 4
    bases = rng.normal(size=(3, dims, d))
    which = rng.integers(3, size=n)
    z = amplitude(rng.normal(size=(n, dims)))
    x = np.einsum("nk,nkd->nd", z, bases[which]).astype(np.float32)
    fit = vsae_jax.fit(
        x,
        variant="vaease",
        d_sae=20,
        lr=3e-3,
        steps=6000,
        batch_size=512,
        seed=seed,
        progress=False,
    )
    last = slice(-10_000, None)
    reader, where = fit.sae.reader, which[last]
    x_n = sae.normalise(reader.variables, jnp.asarray(x[last]))
    params = reader.variables["params"]
    log_var = posterior.log_variance(params, x_n, config=reader.config)
    assert log_var is not None  # vaease learns it
    variance = np.exp(np.asarray(log_var))
    used = [(variance[where == i].mean(0) < 0.05).sum() for i in range(3)]
    open_ = (1 - np.sqrt(variance) > 0.5).sum(1).mean()
    explained = on_rows(reader, x[last], seed=seed).explained_variance
    return {
        "dimensions": float(dims),
        "latents of a subspace": statistics.fmean(map(float, used)),
        "gates more than half open on a row": float(open_),
        "explained variance": explained,
    }


if __name__ == "__main__":
    main()
