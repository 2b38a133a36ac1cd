"""The model card of an upload: README.md, with metrics and how to load it."""

import json
from pathlib import Path
from typing import Any

from vsae_jax import interop
from vsae_jax.interop import provenance
from vsae_jax.interop.canonical import Autoencoder
from vsae_jax.interop.sidecar import NOTE
from vsae_jax.interop.tensors import read_json
from vsae_jax.system.files import replace_file

CARD = "README.md"
_METRICS = {
    "ce_loss_score": "loss recovered",
    "kl_div_score": "KL score",
    "explained_variance": "explained variance",
    "cossim": "cosine similarity",
    "l0": "L0",
    "frac_alive": "share of latents alive",
}
_LOAD = {
    "vsae_jax": "import vsae_jax\n\nsae = vsae_jax.load({name!r})",
    "saelens": "from sae_lens import SAE\n\nsae = SAE.load_from_disk({name!r})",
    "dictionary_learning": (
        "from dictionary_learning.utils import load_dictionary\n\n"
        'sae, config = load_dictionary({name!r}, device="cpu")'
    ),
    "sparsify": (
        "from sparsify import SparseCoder\n\nsae = SparseCoder.load_from_disk({name!r})"
    ),
    "openai": (
        "import torch\nfrom sparse_autoencoder.model import Autoencoder\n\n"
        'state = torch.load("{name}/autoencoder.pt", weights_only=True)\n'
        "sae = Autoencoder.from_state_dict(state)\nsae.normalize = {normalize}"
    ),
}


def evals_of(folder: Path) -> dict[str, Any]:
    """The metrics of `evals/core.json`, if the run was evaluated."""
    path = folder / "evals" / "core.json"
    metrics = read_json(path).get("metrics") if path.is_file() else None
    return metrics if isinstance(metrics, dict) else {}


def write(folder: Path, *, name: str, evals: dict[str, Any]) -> None:
    """README.md for an exported folder, with its self-check."""
    ae, to = interop.read(folder), interop.recognised(folder).NAME
    note = read_json(folder / NOTE)
    notes, check = [*note["notes"], *note["carried"]], note["self_check"]
    code = _LOAD[to].format(name=name, normalize=ae.layer_norm)
    text = [
        _front(ae, to),
        f"# {name}",
        f"A sparse autoencoder ({to} format), written by vsae_jax.",
        _table(_facts(ae), "", ""),
        "## Metrics",
        _table(_measured(evals, check), "metric", "value"),
        "## Load it",
        f"```python\n{code}\n```",
        "or, from any of its formats, `vsae_jax.load(folder_or_hub_id)`.",
        *(("## Notes", "\n".join(f"* {_plain(n)}" for n in notes)) if notes else ()),
    ]
    replace_file(folder / CARD, ("\n\n".join(text) + "\n").encode())


def _front(ae: Autoencoder, to: str) -> str:
    lines = ["---", "library_name: vsae_jax", "tags:", "- sparse-autoencoder"]
    lines += [f"- {to}"] if to != "vsae_jax" else []
    model = provenance.model_name(ae)
    if model and model.count("/") == 1:
        lines += [f"base_model: {json.dumps(model)}"]
    return "\n".join([*lines, "---"])


def _facts(ae: Autoencoder) -> dict[str, Any]:
    train, data = ae.train or {}, ae.data
    return {
        "from": _origin(ae.source),
        "language model": provenance.model_name(ae),
        "hook": data.get("hook_name"),
        "text": provenance.public(data.get("dataset")),
        "d_model": ae.config.d_model,
        "d_sae": ae.config.d_sae,
        "selection rule": ae.rule,
        "k": ae.k,
        "b_dec subtracted from the input": "yes" if ae.config.subtract_b_dec else "no",
        "per-row LayerNorm": "yes" if ae.layer_norm else "no",
        "preset and variant": " ".join(
            str(train[n]) for n in ("preset", "variant") if n in train
        ),
        "steps": train.get("steps"),
        "seed": train.get("seed"),
    }


def _origin(source: dict[str, Any]) -> str | None:
    """Where another library's files came from: format, and repository or file."""
    source = source.get("origin", source)
    if source.get("format") in (None, "vsae_jax"):
        return None
    place = source.get("repository") or source.get("name") or ""
    file = f"/{source['file']}" if "file" in source else ""
    return f"{source['format']}, {place}{file}"


def _measured(evals: dict[str, Any], check: dict[str, Any]) -> dict[str, Any]:
    found = {n: evals.get(n) for n in _METRICS}
    numbers = {_METRICS[n]: v for n, v in found.items() if isinstance(v, int | float)}
    rows = f"on {check['rows']} rows ({check['rows_from']})"
    return numbers | {
        f"self-check: L0 {rows}": check["l0"],
        f"self-check: explained variance {rows}": check["explained_variance"],
        "self-check: max difference of x_hat": check["max_abs_difference"],
    }


def _table(values: dict[str, Any], left: str, right: str) -> str:
    rows = [f"| {left} | {right} |", "|---|---|"]
    for name, value in values.items():
        if value is not None and value != "":
            cell = f"{value:.4g}" if isinstance(value, float) else _plain(value)
            rows.append(f"| {name} | {cell} |")
    return "\n".join(rows)


def _plain(value: Any) -> str:
    """A stranger's words in one cell: no line break, no column border."""
    return " ".join(str(value).split()).replace("|", " ")
