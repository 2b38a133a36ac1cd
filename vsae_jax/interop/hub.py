"""Autoencoders on the hub: fetched to its cache, and pushed."""

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

from vsae_jax.interop import provenance, releases, sidecar
from vsae_jax.lm.files import HUB_TIMEOUT_S, connection_errors
from vsae_jax.system.errors import UserError, one_line

# The files that any format reads; the rest of a repository is not fetched. There is no
# `*`, which would also match in every folder below; OpenAI numbers its files by layer.
_FILES = (
    "config.json",
    "cfg.json",
    "sae.safetensors",
    "sae_weights.safetensors",
    "ae.pt",
    "params.npz",
    "params.safetensors",
    "autoencoder.pt",
    "[0-9].pt",
    "[0-9][0-9].pt",
    sidecar.NOTE,
    sidecar.EXTRA,
    "evals/core.json",
)


class Found(NamedTuple):
    """A folder, and what its name says: `source`, where it is from, and `data`, what is
    known of the language model."""

    folder: Path
    source: dict[str, str]
    data: dict[str, Any]


def find(name: str | Path, *, revision: str | None = None) -> Found:
    """The folder that a name leads to: a local folder, or the snapshot of a hub id
    (`owner/name`, or `owner/name/folder` of a repository with many) at a branch, tag or
    commit, or of one of SAELens' names (`release/id`). A file leads to its folder."""
    folder, name = Path(name).expanduser(), str(name)
    if folder.name in _FILES and not folder.is_dir():
        folder, name = folder.parent, name.rpartition("/")[0] or "."
    # `runs/topc` beside a folder `runs` is a slip, not a hub id.
    local = folder.is_absolute() or Path(folder.parts[0] if name else ".").exists()
    published = None if local else releases.find(name)
    if local or name.startswith(".") or "/" not in name:
        if revision:
            raise UserError(f"revision={revision} needs a hub id, not {name}")
        if near := "" if local else releases.nearest(name):
            raise UserError(f"{name} is not a folder here{near}")
        return Found(folder, {}, {})
    place = f"{published.repository}/{published.path}" if published else name
    owner, repository, *below = place.rstrip("/").split("/")
    if ".." in below:
        raise UserError(f"{name} is neither a folder here nor a hub id")
    repo, inside = f"{owner}/{repository}", "/".join(below)
    snapshot = _fetched(repo, inside, revision=revision)
    source = {"repository": place.rstrip("/"), "revision": snapshot.name}
    if published is None:
        return Found(snapshot / inside, source, {})
    center = {"center_residual": True} if published.center else {}
    return Found(
        snapshot / inside,
        source | {"release": published.name},
        provenance.data(model=published.model) | center,
    )


def _fetched(repo: str, inside: str, *, revision: str | None) -> Path:
    from huggingface_hub import errors, snapshot_download

    prefix = f"{inside}/" if inside else ""
    try:
        path = snapshot_download(
            repo,
            revision=revision,
            allow_patterns=[prefix + name for name in _FILES],
            etag_timeout=HUB_TIMEOUT_S,
        )
    except errors.RevisionNotFoundError:
        raise UserError(
            f"revision={revision} is not a branch, tag or commit of {repo}"
        ) from None
    except errors.GatedRepoError:
        raise UserError(
            f"{repo} is gated: accept its terms on its hub page and log in with "
            "`hf auth login`"
        ) from None
    except (errors.HFValidationError, errors.RepositoryNotFoundError):
        raise UserError(
            f"{repo} is neither a folder here nor a repository that the hub shows you "
            "(a private one needs `hf auth login`)"
            f"{releases.nearest(f'{repo}/{inside}')}"
        ) from None
    except connection_errors() as error:
        raise UserError(
            f"{repo} is not a folder here and cannot be fetched ({one_line(error)})"
            f"{releases.nearest(f'{repo}/{inside}')}"
        ) from None
    return Path(path)


def push(folder: Path, repo: str, *, private: bool) -> str:
    """Uploads every file of the folder as one commit, local paths in JSON files cut to
    their last part; returns its address."""
    from huggingface_hub import CommitOperationAdd, HfApi, errors

    api = HfApi()
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        done = api.create_commit(
            repo,
            [
                CommitOperationAdd(path.relative_to(folder).as_posix(), content(path))
                for path in sorted(folder.rglob("*"))
                if path.is_file()
            ],
            commit_message="An autoencoder, written by vsae_jax",
        )
    except (errors.HFValidationError, *connection_errors()) as error:
        raise UserError(
            f"--push_to_hub={repo} failed, but {folder} is written: `hf auth login`, "
            f"then `hf upload {repo} {folder}` ({one_line(error)})"
        ) from None
    return str(done.commit_url)


def content(path: Path) -> str | bytes:
    """What is uploaded for a file: its path; or a JSON file's text, in which only the
    last part of each absolute path is left."""
    if path.suffix != ".json":
        return os.fspath(path)
    value = _without_folders(json.loads(path.read_text()))
    return (json.dumps(value, indent=2, allow_nan=False) + "\n").encode()


def _without_folders(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_folders(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_without_folders(item) for item in value]
    is_path = isinstance(value, str) and (os.path.isabs(value) or value[:1] == "~")
    return os.path.basename(value.rstrip("/")) if is_path else value
