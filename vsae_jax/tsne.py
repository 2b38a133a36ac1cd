"""`python -m vsae_jax.tsne --run=RUN`: a map of the latents, with numbers about it.

The paper's t-SNE (its figures 10 and 11) as the authors made it, of the latents that
fire on more than 1 % of tokens. A point is a latent's activations on 20,000 samples,
standardised; the perplexity is min(30, (n - 1) // 3), the seed 42, and k-means makes 10
clusters from the two dimensions. With `--points=decoder`, a point is a decoder row at
norm 1. Firing rates are those in `RUN/features/`. Writes

    RUN/maps/maps.json, maps.npz            (maps-decoder.json, ... of --points=decoder)
    embedding [n_points, 2], latents [n_points], cluster [n_points], firing_rate,
    mean_activation, nearest_cosine [n_points]; cosine_counts, cosine_edges: all pairs

and for a grid one table over seeds, `GRID/maps.md`.
"""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from vsae_jax import runs
from vsae_jax.activations.shards import Activations
from vsae_jax.config import MapConfig, cli
from vsae_jax.config.fields import to_json
from vsae_jax.interop.loading import open_any
from vsae_jax.latents import map_statistics
from vsae_jax.latents.feature_files import FiringStatistics, read_statistics
from vsae_jax.runs import TrainedSAE, opening, series
from vsae_jax.runs.series import Arm
from vsae_jax.system.errors import UserError, missing_extra
from vsae_jax.system.files import replace_file

FOLDER = "maps"
# The columns of the table, in order.
COLUMNS = {
    "n_points": "points",
    "n_alive_above_0": "fire",
    "entropy_effective_latents": "effective",
    "effective_share_of_alive": "effective / fire",
    "rate_cv": "rate cv",
    "cluster_size_cv": "cluster size cv",
    "cluster_rate_cv": "cluster rate cv",
    "cluster_rate_cv_shuffled": "by chance",
    "nn_cosine_mean": "nn cosine",
    "nn_cosine_random": "random",
    "silhouette_original": "silhouette",
    "silhouette_2d": "in 2-D",
}
LEGEND = """\
points: latents on the map. fire: latents that fire at all. effective: exp of the
entropy of the firing rates' shares. cv: standard deviation / mean, of firing rates,
of the clusters' sizes and of their mean rates; by chance: the last with the latents
dealt out at random. nn cosine: mean cosine of a decoder row to its nearest; random:
for as many random directions. silhouette: of the clusters in the space that was
embedded, and in 2-D, where k-means drew them. Mean ± standard deviation over seeds."""
_PERPLEXITY = 30
_BATCH_ROWS = 1024

Ids = Int[np.ndarray, " n"]
Points = Float[np.ndarray, "n d"]


def command(configs: Sequence[MapConfig]) -> None:
    """Maps what `--run` names and prints the table."""
    run(configs[0])


def run(c: MapConfig) -> dict[str, dict[str, Any]]:
    """Writes `maps/` in every run folder; returns the metrics by folder."""
    found = series.open_arms(c.run)
    chosen = [_chosen(arm, read_statistics(arm), c) for arm in found]
    results = {}
    for arm, latents in zip(found, chosen, strict=True):
        print(f"{arm.folder}: {len(latents):,} latents")
        results[arm.folder.name] = _write(arm, latents, c)["metrics"]
    said = f"{table(found, results)}\n\n{LEGEND}"
    print(said)
    if len(found) > 1:
        path = Path(c.run) / f"{_stem(c)}.md"
        replace_file(path, f"{said}\n".encode())
        print(f"wrote {path}")
    return results


def table(found: Sequence[Arm], results: dict[str, dict[str, Any]]) -> str:
    """A Markdown row for each series: mean ± standard deviation over seeds."""
    rows = [["", "seeds", *COLUMNS.values()]]
    for shared, members in series.series_of(found).items():
        metrics = [results[arm.folder.name] for arm in members]
        cells = [series.spread([m[name] for m in metrics]) for name in COLUMNS]
        rows.append([series.label(shared), str(len(members)), *cells])
    return series.markdown(rows)


def _chosen(arm: Arm, features: FiringStatistics, c: MapConfig) -> Ids:
    latents = np.flatnonzero(features.firing_rate > c.min_rate)
    if len(latents) < max(c.clusters + 1, 4):
        raise UserError(
            f"{arm.folder}: {len(latents)} latents fire on more than {c.min_rate:.3g} "
            f"of the tokens, too few for {c.clusters} clusters; lower --min_rate"
        )
    return latents


def _write(arm: Arm, latents: Ids, c: MapConfig) -> dict[str, Any]:
    features, opened = read_statistics(arm), open_any(arm.folder)
    w_dec = np.asarray(opened.variables["params"]["w_dec"])
    if len(w_dec) != len(features.firing_rate):
        raise UserError(f"{arm.folder}: features/ are of another autoencoder")
    latents, points = as_points(opened, latents, c)
    embedding, cluster = embed(points, clusters=c.clusters, seed=c.seed)
    nearest, counts = map_statistics.cosines(w_dec[latents])
    rate = features.firing_rate[latents]
    metrics = {
        "n_points": float(len(latents)),
        **map_statistics.alive_counts(features.firing_rate, features.max_activation),
        **map_statistics.cluster_numbers(cluster, rate, seed=c.seed),
        **_nearness(w_dec, latents, features.firing_rate, seed=c.seed),
        **_silhouettes(points, embedding, cluster),
    }
    arrays = {
        "embedding": embedding,
        "latents": latents,
        "cluster": cluster,
        "firing_rate": rate,
        "mean_activation": features.mean_activation[latents],
        "nearest_cosine": nearest,
        "cosine_counts": counts,
        "cosine_edges": map_statistics.COSINE_EDGES,
    }
    result = {"metrics": metrics, "config": dict(arm.settings) | {"map": to_json(c)}}
    folder = arm.folder / FOLDER
    folder.mkdir(exist_ok=True)
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    replace_file(folder / f"{_stem(c)}.npz", buffer.getvalue())
    runs.write_json(folder / f"{_stem(c)}.json", result)
    print(f"wrote {folder / _stem(c)}.json and .npz")
    return result


def _stem(c: MapConfig) -> str:
    return "maps" if c.points == "activations" else f"maps-{c.points}"


def as_points(run: TrainedSAE, latents: Ids, c: MapConfig) -> tuple[Ids, Points]:
    """The latents and their points, without latents that do not vary in the sample."""
    if c.points == "decoder":
        rows = np.asarray(run.variables["params"]["w_dec"])[latents]
        return latents, map_statistics.unit_rows(rows)
    f = sampled_latents(run, latents, c)
    varies = f.std(0) > 0
    latents, f = latents[varies], f[:, varies]
    return latents, ((f - f.mean(0)) / f.std(0)).T


def sampled_latents(
    run: TrainedSAE, latents: Ids, c: MapConfig
) -> Float[np.ndarray, "samples n"]:
    """Activations on at most `--samples` rows, evenly spaced among the held-out ones;
    rows of special tokens are left out."""
    run = opening.filled(run, c)
    activations = opening.open_activations(run, c)
    start, stop, _ = opening.held_out(run, activations)
    row = _text_rows(activations, start, stop)
    row = row[np.linspace(0, len(row) - 1, min(c.samples, len(row))).astype(int)]
    parts = []
    for first in range(0, len(row), _BATCH_ROWS):
        some = row[first : first + _BATCH_ROWS]
        x = activations.view(int(some[0]), int(some[-1]) + 1)[some - some[0]]
        parts.append(np.asarray(run.encode(x))[:, latents])
    return np.concatenate(parts)


def _text_rows(activations: Activations, start: int, stop: int) -> np.ndarray:
    """The numbers of the rows of the contexts start, ..., stop - 1 whose tokens are not
    special."""
    m = activations.manifest
    tokens = activations.tokens(start, stop)[:, m.dropped_positions :]
    keep = ~np.isin(tokens.ravel(), m.special_ids)
    return start * activations.rows_per_context + np.flatnonzero(keep)


def embed(
    points: Points, *, clusters: int, seed: int
) -> tuple[Float[np.ndarray, "n 2"], Ids]:
    """The points in two dimensions by t-SNE, and their clusters there by k-means."""
    try:
        from sklearn.cluster import KMeans
        from sklearn.manifold import TSNE
    except ImportError:
        raise missing_extra("scikit-learn", extra="analysis") from None
    perplexity = min(_PERPLEXITY, (len(points) - 1) // 3)
    embedding = TSNE(perplexity=perplexity, random_state=seed).fit_transform(points)
    # Its stub says that n_init is a str.
    kmeans = KMeans(clusters, n_init=10, random_state=seed)  # pyright: ignore
    return embedding, kmeans.fit_predict(embedding)


def _silhouettes(
    points: Points, embedding: Float[np.ndarray, "n 2"], cluster: Ids
) -> dict[str, float]:
    """The clusters' silhouettes in the space that was embedded, and in the two
    dimensions in which k-means found them."""
    from sklearn.metrics import silhouette_score

    spaces = {"silhouette_original": points, "silhouette_2d": embedding}
    return {n: float(silhouette_score(p, cluster)) for n, p in spaces.items()}


def _nearness(
    w_dec: Float[np.ndarray, "d_sae d_model"],
    latents: Ids,
    rate: Float[np.ndarray, " d_sae"],
    *,
    seed: int,
) -> dict[str, float]:
    """Nearest cosines of decoder rows, for the mapped latents and for all that fire,
    with those of as many random directions."""
    numbers = {}
    for name, some in (("nn_cosine", latents), ("nn_cosine_alive", rate > 0)):
        rows = w_dec[some]
        nearest = map_statistics.cosines(rows)[0]
        numbers |= {
            f"{name}_mean": float(nearest.mean()),
            f"{name}_median": float(np.median(nearest)),
            f"{name}_above_0.9": float((nearest > 0.9).mean()),
            f"{name}_random": map_statistics.random_nearest_cosine(
                *rows.shape, seed=seed
            ),
        }
    return numbers


if __name__ == "__main__":
    cli.main(command, MapConfig)
