"""The paper's four t-SNE panels (figures 10 and 11), and the decoder's cosines."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from vsae_jax.interop.loading import open_any
from vsae_jax.latents import map_statistics
from vsae_jax.report.figures import style
from vsae_jax.runs import series
from vsae_jax.runs.series import Arm

_CLUSTERS = "Clusters of k-means in 2-D"


class Map(NamedTuple):
    """`maps.json` and `maps.npz` of a run."""

    arm: Arm
    metrics: Mapping[str, float]
    arrays: Mapping[str, np.ndarray]


def read_map(arm: Arm) -> Map:
    """The map of an arm, which `vsae_jax.tsne` must have made."""
    metrics = arm.read("maps", "maps.json", made_by="tsne")["metrics"]
    path = arm.path("maps", "maps.npz", made_by="tsne")
    with np.load(path, allow_pickle=False) as stored:
        return Map(arm, metrics, {name: stored[name] for name in stored.files})


def panels(arms: Sequence[Arm]) -> Iterator[tuple[str, Figure]]:
    """A figure for each series, of its first seed."""
    for shared, members in series.series_of(arms).items():
        label, seed = series.label(shared), members[0].settings.get("seed")
        of_seed = "" if seed is None else f", seed {seed}"
        figure = draw_panels(read_map(members[0]), title=label + of_seed)
        yield f"maps_{label.replace(', ', '_').replace(' ', '-')}", figure


def draw_panels(of: Map, *, title: str) -> Figure:
    """Maps of clusters, firing rates and mean activations; and rates by cluster."""
    arrays, m = of.arrays, of.metrics
    cluster, rate = arrays["cluster"], arrays["firing_rate"]
    figure = style.figure(9.0, 7.2)
    figure.suptitle(f"{title}: {len(cluster):,} latents")
    (clusters, rates), (means, bars) = figure.subplots(2, 2)
    colours = np.array(style.CLUSTERS)[cluster % len(style.CLUSTERS)]
    # With more clusters than colours, those from ten on have another marker.
    kind = cluster // len(style.CLUSTERS)
    for n in range(kind.max() + 1):
        look = {"c": colours[kind == n], "s": 10, "marker": style.MARKERS[n % 4]}
        _scatter(clusters, arrays, _CLUSTERS, some=kind == n, **look)
    for c in range(cluster.max() + 1):
        middle = arrays["embedding"][cluster == c].mean(0)
        box = {"facecolor": "white", "alpha": 0.8, "edgecolor": "none", "pad": 1}
        clusters.text(*middle, str(c), ha="center", va="center", bbox=box)
    dots = _scatter(rates, arrays, "Firing rate", c=rate, s=10, norm=LogNorm())
    figure.colorbar(dots, ax=rates, label="share of tokens (log)")
    mean = np.maximum(arrays["mean_activation"], 1e-30)
    dots = _scatter(
        means,
        arrays,
        "Mean activation, size = firing rate",
        c=mean,
        s=100 * rate + 10,
        norm=LogNorm(),
    )
    figure.colorbar(dots, ax=means, label="mean over all tokens, scaled input (log)")
    _bars(bars, cluster, rate)
    style.caption(
        figure,
        f"Spread of the clusters' rates (sd / mean) {m['cluster_rate_cv']:.2f}; dealt "
        f"out at random {m['cluster_rate_cv_shuffled']:.2f}. Silhouette of the "
        f"clusters in 2-D {m['silhouette_2d']:.2f}, in the space that was embedded "
        f"{m['silhouette_original']:.2f}.",
    )
    return figure


def _scatter(
    ax: Axes,
    arrays: Mapping[str, np.ndarray],
    title: str,
    *,
    some: np.ndarray | slice = slice(None),
    **look: Any,
) -> Any:
    x, y = arrays["embedding"][some].T
    ax.set(title=title, xlabel="t-SNE 1", ylabel="t-SNE 2")
    return ax.scatter(x, y, alpha=0.8, linewidths=0, rasterized=True, **look)


def _bars(ax: Axes, cluster: np.ndarray, rate: np.ndarray) -> None:
    sizes = np.bincount(cluster)
    means = np.bincount(cluster, weights=rate) / sizes
    names = [f"{c}\n{n}" for c, n in enumerate(sizes)]
    ax.bar(np.arange(len(means)), means, color=style.BLUE)
    level = float(rate.mean())
    ax.axhline(level, color=style.GREY, linestyle="--", label="mean of all latents")
    ax.set(title="Firing rate by cluster", ylabel="mean firing rate")
    ax.set_xlabel("cluster, and how many latents it has")
    ax.set_xticks(np.arange(len(means)), names)
    ax.margins(y=0.15)
    ax.legend(fontsize=8)


def cosines(arms: Sequence[Arm]) -> Iterator[tuple[str, Figure]]:
    """Cosines between decoder rows of the mapped latents: a matrix for each series'
    first seed, sorted by cluster; then those of all pairs and of nearest neighbours."""
    kinds = {
        shared: [read_map(arm) for arm in members]
        for shared, members in series.series_of(arms).items()
    }
    figure = style.figure(max(2.9 * len(kinds), 8.0), 6.2)
    parts: Any = figure.subfigures(2, 1, height_ratios=(1, 1.1))
    above, below = parts
    axes = above.subplots(1, len(kinds), squeeze=False)[0]
    image: Any = None
    for ax, (shared, maps) in zip(axes, kinds.items(), strict=True):
        image = _matrix(ax, maps[0], title=series.label(shared))
    above.colorbar(image, ax=list(axes), label="cosine", shrink=0.8, extend="both")
    pairs, nearest = below.subplots(1, 2)
    looks = style.looks(list(kinds))
    for shared, maps in kinds.items():
        look = {n: v for n, v in looks[shared].items() if n != "marker"}
        name = series.label(shared)
        _distribution(pairs, [m.arrays["cosine_counts"] for m in maps], name, look)
        counts = [
            np.histogram(m.arrays["nearest_cosine"], map_statistics.COSINE_EDGES)[0]
            for m in maps
        ]
        _distribution(nearest, counts, name, look)
        chance = np.mean([m.metrics["nn_cosine_random"] for m in maps])
        nearest.axvline(float(chance), color=look["color"], linestyle=":", linewidth=1)
    pairs.set(title="All pairs", yscale="log", xlabel="cosine", ylabel="share of pairs")
    nearest.set(title="Nearest neighbour", xlabel="cosine", ylabel="share of latents")
    nearest.set_xlim(0, 1)
    nearest.legend(fontsize=8)
    style.caption(
        figure,
        "Line: mean over seeds. Band: lowest to highest seed. Dotted: mean for as many "
        "random directions. Rows of a matrix: by cluster.",
    )
    yield "cosines", figure


def _matrix(ax: Axes, of: Map, *, title: str) -> Any:
    w_dec = np.asarray(open_any(of.arm.folder).variables["params"]["w_dec"])
    order = np.lexsort((of.arrays["latents"], of.arrays["cluster"]))
    rows = map_statistics.unit_rows(w_dec[of.arrays["latents"][order]])
    ax.grid(False)
    ax.set(title=title, xlabel="latent", xticks=[], yticks=[])
    return ax.imshow(rows @ rows.T, vmin=-0.5, vmax=0.5, cmap="RdBu_r", rasterized=True)


def _distribution(
    ax: Axes, counts: Sequence[np.ndarray], name: str, look: dict[str, Any]
) -> None:
    shares = np.stack([c / max(c.sum(), 1) for c in counts])
    edges = map_statistics.COSINE_EDGES
    middle = (edges[:-1] + edges[1:]) / 2
    some = shares.max(0) > 0
    ax.plot(middle[some], shares.mean(0)[some], label=name, **look)
    band = shares.min(0)[some], shares.max(0)[some]
    ax.fill_between(middle[some], *band, color=look["color"], alpha=0.2, linewidth=0)
