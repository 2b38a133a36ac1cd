"""SAELens' names of published autoencoders: `release/id` to a place on the hub.

The table is that of the installed SAELens (which is not imported), or else the one
bundled here (`experiments/make_release_table.py`): names and places, no weights.
"""

import difflib
import json
import lzma
from collections.abc import Iterator, Mapping
from functools import cache
from importlib import resources, util
from pathlib import Path
from typing import Any, NamedTuple

from vsae_jax.system.errors import UserError

TABLE = "sae_releases.json.xz"
_YAML = "pretrained_saes.yaml"
# SAELens' name of a format -> ours.
READ = {
    "sae_lens": "saelens",
    "gemma_2": "gemma_scope",
    "gemma_3": "gemma_scope",
    "dictionary_learning_1": "dictionary_learning",
    "sparsify": "sparsify",
}
_TRANSCODERS = ("transcoder", "crosscoder", "clt")


class Published(NamedTuple):
    """Where a published autoencoder is, and what its files may not say.

    format: SAELens' name of it. center: it reads rows whose mean over d_model is
      subtracted.
    """

    name: str
    repository: str
    path: str
    format: str
    model: str
    center: bool


def find(name: str) -> Published | None:
    """The autoencoder called `release/id`; None if there is no such release. Refuses
    an id that it does not have, and a format that is not read."""
    release, _, sae = name.rstrip("/").partition("/")
    if release not in _table():
        return None
    found = _table()[release]
    if sae not in found["saes"]:
        near = difflib.get_close_matches(sae, found["saes"], n=3, cutoff=0)
        raise UserError(
            f"{release} is a release of {len(found['saes'])} autoencoders, and "
            f"{sae or 'none'!r} is not one of them; nearest: "
            + ", ".join(f"{release}/{other}" for other in near)
        )
    published = _published(release, found, sae)
    if published.format not in READ:
        raise UserError(
            f"{name} is in the format {published.format}, which is not read; those "
            f"that are: {', '.join(READ)}"
        )
    return published


def nearest(name: str) -> str:
    """`; did you mean ...` with the releases of similar names, or nothing."""
    release, _, sae = name.partition("/")
    near = []
    for other in difflib.get_close_matches(release, _table(), n=3, cutoff=0.75):
        saes = difflib.get_close_matches(sae, _table()[other]["saes"], n=1, cutoff=0)
        near += [f"{other}/{saes[0]}"]
    return f"; did you mean {' or '.join(near)}?" if near else ""


def all_published() -> Iterator[Published]:
    """Every autoencoder of the table."""
    for release, found in _table().items():
        for sae in found["saes"]:
            yield _published(release, found, sae)


def from_saelens(stored: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The table, made from the content of SAELens' pretrained_saes.yaml."""
    return {
        release: {
            "repository": said["repo_id"],
            "model": said["model"],
            "format": said.get("conversion_func") or "sae_lens",
            "saes": {str(sae["id"]): str(sae["path"]) for sae in said["saes"]},
            **_overrides(said.get("config_overrides") or {}),
        }
        for release, said in stored.items()
    }


def _overrides(said: Mapping[str, Any]) -> dict[str, Any]:
    """The part of SAELens' overrides of a config that changes a latent."""
    model = said.get("model_from_pretrained_kwargs") or {}
    center = {"center": True} if model.get("center_writing_weights") else {}
    normalised = said.get("normalize_activations", "none")
    return center | ({} if normalised == "none" else {"normalize": normalised})


def _published(release: str, found: Mapping[str, Any], sae: str) -> Published:
    path, format = found["saes"][sae], found["format"]
    if format == "gemma_3" and any(word in path for word in _TRANSCODERS):
        format = "gemma_3_transcoder"
    if "normalize" in found:
        format = f"{format}_{found['normalize']}"
    return Published(
        name=f"{release}/{sae}",
        repository=found["repository"],
        path=path,
        format=format,
        model=found["model"],
        center=found.get("center", False),
    )


@cache
def _table() -> dict[str, dict[str, Any]]:
    spec = util.find_spec("sae_lens")
    for folder in (spec and spec.submodule_search_locations) or ():
        path = Path(folder) / _YAML
        if path.is_file():
            import yaml

            loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
            return from_saelens(loader(path.read_text("utf-8")).get_single_data())
    bundled = resources.files("vsae_jax") / "data" / TABLE
    return json.loads(lzma.decompress(bundled.read_bytes()))["releases"]


# For tests, in which another SAELens appears.
forget = _table.cache_clear
