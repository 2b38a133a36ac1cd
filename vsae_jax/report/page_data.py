"""What a dashboard's page holds about one autoencoder, as JSON: a row of numbers for
every latent, and some latents in full.

Numbers are rounded to a few digits; `features.npz` has the full ones.
"""

import json
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from vsae_jax import runs
from vsae_jax.config.fields import to_json
from vsae_jax.latents.map_statistics import unit_rows
from vsae_jax.runs import TrainedSAE
from vsae_jax.system.errors import UserError

# The latents in one compressed block of the page, in full and in brief.
CHUNK, CHUNK_IN_BRIEF = 16, 64
# The texts of a latent in brief, and the tokens on each side of the strongest one.
_BRIEF_TEXTS, _BRIEF_REACH = 5, 8
_PROMISED = 3
_CURVE_POINTS = 400
_CURVES = ("loss", "explained_variance", "squared_error", "kl", "l0", "dead_fraction")
MAP, MAXIMISED = Path("maps") / "maps.npz", "maximised"
_NO_MAP = (
    "The first two principal components of the decoder's rows of latents that fire. "
    "A t-SNE map is shown here once it is made: python -m vsae_jax.tsne --run=RUN"
)


class Features(NamedTuple):
    """A run with the content of its `features/`."""

    run: TrainedSAE
    arrays: dict[str, np.ndarray]
    info: dict[str, Any]


def overview(side: Features, full: list[int], *, name: str) -> dict[str, Any]:
    """Everything but the latents in full."""
    info = side.info
    return {
        "name": name,
        "model": Path(info["model"]).name,
        "hook": info["hook_name"],
        "where": info["contexts_from"],
        "n_tokens": info["n_tokens"],
        "d_sae": side.run.sae.d_sae,
        "settings": settings(side.run),
        "metrics": core_metrics(side.run.folder),
        "training": training_curves(side.run.folder / runs.METRICS),
        "columns": columns(side.arrays),
        "map": latent_map(side),
        "prompts": prompts(side.arrays),
        "full": full,
        "chunk": CHUNK,
        "chunk_in_brief": CHUNK_IN_BRIEF,
        "texts": texts(side, full),
    }


def settings(run: TrainedSAE) -> dict[str, Any]:
    """The settings of a run, and what it was trained on."""
    shown = to_json(run.sae) | (to_json(run.train) if run.train else {})
    data = {n: run.data.get(n) for n in ("model", "hook_name", "dataset", "bos")}
    return data | {n: v for n, v in shown.items() if n not in ("activations", "out")}


def core_metrics(folder: Path) -> dict[str, float] | None:
    """The numbers in `evals/core.json`, if the run was evaluated."""
    path = folder / runs.EVALS / "core.json"
    if not path.is_file():
        return None
    metrics = runs.read_json(path).get("metrics")
    found = metrics if isinstance(metrics, dict) else {}
    return {n: v for n, v in found.items() if isinstance(v, int | float)}


def training_curves(path: Path) -> dict[str, list] | None:
    """The curves in metrics.jsonl, with at most 400 points each."""
    if not path.is_file():
        return None
    try:
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        every = max(len(lines) // _CURVE_POINTS, 1)
        some = lines[::-every][::-1]
        names = [n for n in _CURVES if all(n in line for line in some)]
        curves = {n: [short(float(line[n])) for line in some] for n in names}
        return {"step": [int(line["step"]) for line in some], **curves}
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path} is not what train writes: {error}") from None


def columns(arrays: dict[str, np.ndarray]) -> dict[str, list]:
    """The columns of the table of all latents."""
    reach = arrays["top_ids"].shape[2] // 2
    return {
        "fired": arrays["n_fired"].tolist(),
        "rate": shorts(arrays["firing_rate"]),
        "max": shorts(arrays["max_activation"]),
        "mean": shorts(arrays["mean_when_active"]),
        "mean_all": shorts(arrays["mean_activation"]),
        "norm": shorts(arrays["decoder_norm"]),
        "peak": [_most_common(ids) for ids in arrays["top_ids"][:, :, reach].tolist()],
        "promotes": arrays["top_logit_tokens"][:, :_PROMISED].tolist(),
        "logit": shorts(arrays["top_logits"][:, 0]),
    }


def _most_common(ids: list[int]) -> int:
    """The commonest token among a latent's strongest contexts; of equally common ones
    that of the stronger context; -1 for none."""
    counted = Counter(i for i in ids if i >= 0)
    return max(counted, key=counted.__getitem__) if counted else -1


def latent_map(side: Features) -> dict[str, Any]:
    """The run's own map, or the decoder's principal components."""
    path = side.run.folder / MAP
    if not path.is_file():
        latents, xy = _principal_components(side)
        return _map("Decoder rows, PCA", _NO_MAP, latents, xy, None)
    with np.load(path, allow_pickle=False) as maps:
        missing = {"embedding", "latents", "cluster"} - set(maps.files)
        if missing:
            raise UserError(f"{path} lacks {', '.join(sorted(missing))}")
        found = {name: maps[name] for name in ("embedding", "latents", "cluster")}
    d_sae, latents = side.run.sae.d_sae, found["latents"]
    outside = len(latents) and (latents.min() < 0 or latents.max() >= d_sae)
    if outside or not len(latents) == len(found["embedding"]) == len(found["cluster"]):
        raise UserError(f"{path} is not of this run's {d_sae} latents; make it again")
    note = f"{len(latents):,} latents."
    return _map("t-SNE", note, latents, found["embedding"], found["cluster"])


def _map(title: str, note: str, latents: Any, xy: Any, cluster: Any) -> dict[str, Any]:
    return {
        "title": title,
        "note": note,
        "latents": latents.tolist(),
        "x": shorts(xy[:, 0]),
        "y": shorts(xy[:, 1]),
        "cluster": None if cluster is None else cluster.tolist(),
    }


def _principal_components(side: Features) -> tuple[np.ndarray, np.ndarray]:
    alive = np.flatnonzero(side.arrays["n_fired"])
    w = np.asarray(side.run.variables["params"]["w_dec"], np.float64)[alive]
    w = unit_rows(w)
    w = w - w.mean(0) if len(w) else w
    _, vectors = np.linalg.eigh(w.T @ w)
    return alive, w @ vectors[:, ::-1][:, :2]


def prompts(arrays: dict[str, np.ndarray]) -> list[dict[str, Any]]:
    """The contexts that are shown whole."""
    return [
        {
            "ids": arrays["prompt_ids"][n].tolist(),
            "latents": [
                [i for i, v in zip(*row, strict=True) if v != 0]
                for row in zip(latents.tolist(), values.tolist(), strict=True)
            ],
            "values": [[short(v) for v in row if v != 0] for row in values.tolist()],
        }
        for n, (latents, values) in enumerate(
            zip(arrays["prompt_latents"], arrays["prompt_values"], strict=True)
        )
    ]


def texts(side: Features, full: list[int]) -> dict[str, str]:
    """The text of every token that the page shows."""
    a, reach = side.arrays, side.arrays["top_ids"].shape[2] // 2
    shown = [a["top_ids"][:, :, reach], a["top_logit_tokens"][:, :_PROMISED]]
    wholly = ("top_ids", "quantile_ids", "top_logit_tokens", "bottom_logit_tokens")
    shown += [a["prompt_ids"], *(a[name][full] for name in wholly)]
    shown.append(_in_brief(a)["top_ids"])
    ids = np.unique(np.concatenate([part.ravel() for part in shown]))
    known = side.info["tokens"]
    return {str(i): known.get(str(i), f"<{i}>") for i in ids.tolist() if i >= 0}


def feature(side: Features, latent: int) -> dict[str, Any]:
    """One latent in full."""
    a = side.arrays
    counts = np.trim_zeros(a["histogram"][latent])
    there = np.flatnonzero(a["histogram"][latent])
    first = int(there[0]) - a["histogram"].shape[1] // 2 if len(there) else 0
    return {
        "max": short(float(a["max_activation"][latent])),
        "std": short(float(a["std_when_active"][latent])),
        "fired": int(a["n_fired"][latent]),
        "sampled": int(a["quantile_sampled"][latent]),
        "top": _sequences(a, "top", (latent,)),
        "groups": _groups(a, latent),
        "histogram": {
            "width": float(a["histogram_width"][latent]),
            "first": first,
            "counts": counts.tolist(),
        },
        "logits": {
            "top": _pairs(a["top_logit_tokens"][latent], a["top_logits"][latent]),
            "bottom": _pairs(
                a["bottom_logit_tokens"][latent], a["bottom_logits"][latent]
            ),
            "histogram": a["logit_histogram"][latent].tolist(),
            "range": shorts(a["logit_range"][latent]),
        },
        "correlated": _pairs(a["correlated_latents"][latent], a["correlation"][latent]),
        "neighbours": _pairs(
            a["neighbour_latents"][latent], a["neighbour_cosine"][latent]
        ),
        "maximised": maximised(side.run.folder / MAXIMISED / f"{latent}.json"),
    }


def briefs(side: Features, latents: list[int]) -> list[list[dict[str, Any]]]:
    """The strongest texts of each latent."""
    a = _in_brief(side.arrays)
    return [_sequences(a, "top", (latent,)) for latent in latents]


def _in_brief(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The arrays of the strongest texts, cut to fewer and shorter ones."""
    middle = arrays["top_ids"].shape[2] // 2
    near = slice(max(middle - _BRIEF_REACH, 0), middle + _BRIEF_REACH + 1)
    found = {f"top_{n}": arrays[f"top_{n}"] for n in ("context", "position")}
    found = {name: array[:, :_BRIEF_TEXTS] for name, array in found.items()}
    windows = ("top_ids", "top_values")
    return found | {n: arrays[n][:, :_BRIEF_TEXTS, near] for n in windows}


def _groups(a: dict[str, np.ndarray], latent: int) -> list[dict[str, Any]]:
    edges = shorts(a["quantile_edges"][latent])
    return [
        {
            "high": edges[g],
            "low": edges[g + 1],
            "found": _sequences(a, "quantile", (latent, g)),
        }
        for g in range(a["quantile_context"].shape[1])
    ]


def _sequences(
    a: dict[str, np.ndarray], kind: str, at: tuple[int, ...]
) -> list[dict[str, Any]]:
    """A latent's sequences, without tokens outside of the context."""
    found = []
    reach = a[f"{kind}_ids"].shape[-1] // 2
    effects = a.get("top_loss_effect") if kind == "top" else None
    for n in np.flatnonzero(a[f"{kind}_context"][at] >= 0):
        ids = a[f"{kind}_ids"][at][n]
        inside = ids >= 0
        measured = None
        if effects is not None and n < effects.shape[1]:
            measured = shorts(effects[at][n][inside])
        found.append(
            {
                "context": int(a[f"{kind}_context"][at][n]),
                "position": int(a[f"{kind}_position"][at][n]),
                "ids": ids[inside].tolist(),
                "values": shorts(a[f"{kind}_values"][at][n][inside]),
                "peak": int(inside[:reach].sum()),
                "effects": measured,
            }
        )
    return found


def maximised(path: Path) -> dict[str, Any] | None:
    """The synthetic and the real maximum, if maximise.py wrote them."""
    if not path.is_file():
        return None
    stored = runs.read_json(path)
    parts = {}
    for name in ("synthetic", "real"):
        part = stored.get(name)
        part = part if isinstance(part, dict) else {}
        tokens, values = part.get("tokens"), part.get("activations")
        if not isinstance(tokens, list) or not isinstance(values, list):
            raise UserError(f"{path} has no tokens and activations under {name!r}")
        if len(tokens) != len(values) or not all(isinstance(t, str) for t in tokens):
            raise UserError(f"{path}: tokens and activations of {name!r} do not match")
        parts[name] = {"tokens": tokens, "activations": shorts(np.array(values, float))}
    return parts


def _pairs(
    ids: Int[np.ndarray, " n"], values: Float[np.ndarray, " n"]
) -> list[list[Any]]:
    pairs = zip(ids.tolist(), values.tolist(), strict=True)
    return [[i, short(v)] for i, v in pairs if i >= 0]


def short(value: float) -> float | None:
    """The value with five digits; None for NaN and infinity."""
    return float(f"{value:.5g}") if np.isfinite(value) else None


def shorts(values: Float[np.ndarray, "..."]) -> list[Any]:
    """`short` of each value of a vector."""
    return [0 if v == 0 else short(v) for v in values.tolist()]
