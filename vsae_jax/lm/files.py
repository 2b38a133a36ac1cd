"""Where a language model's files are: a local folder, or the hub and its cache.

The hub is asked once, without retries, which commit is meant. Every file then comes
from that commit through huggingface_hub, so that the user's cache, token, endpoint and
offline mode (`HF_HUB_OFFLINE=1`) work as usual.
"""

import dataclasses
import hashlib
import json
import os
from functools import cached_property
from pathlib import Path
from typing import Any

from vsae_jax.system.errors import UserError, one_line
from vsae_jax.system.strict_json import read_object

# Without it, importing transformers without torch prints that torch is missing.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

WAYS_ON = (
    "give --model= a local folder with config.json, tokenizer.json and "
    "model.safetensors, or run the offline demo: python -m vsae_jax.demo"
)
HUB_TIMEOUT_S = 10.0

# The first complete set is the tokenizer; the order is transformers' own.
TOKENIZER_FILES = (
    ("tokenizer.json",),
    ("tokenizer.model",),
    ("spiece.model",),
    ("vocab.json", "merges.txt"),
    ("vocab.txt",),
)
_JSON_LIMIT = 2**26
VOLATILE_KEYS = ("transformers_version", "_name_or_path", "_commit_hash")


@dataclasses.dataclass(frozen=True)
class ModelFiles:
    """A language model's files, not yet read.

    name: what the user gave.
    folder: the local folder; None for a hub id.
    revision: the hub commit; None for a folder.
    cached_only: the hub could not be asked, so only the cache is read.
    """

    name: str
    folder: Path | None = None
    revision: str | None = None
    cached_only: bool = False

    @cached_property
    def config(self) -> dict[str, Any]:
        """config.json as it stands, so that both spellings of a family can be read."""
        return read_json(need(self, "config.json"))


@dataclasses.dataclass(frozen=True)
class ModelFacts:
    """What is known of a model without running it.

    files: where it was read from; its tokenizer is there, too.
    max_positions: the longest context it was made for; None where it does not say.
    dtype: that of products' operands, float32 or bfloat16; sums are float32.
    bos_id: what starts a context: BOS, or EOS where the model has no BOS.
    special_ids: the ids of BOS, EOS and padding, those that exist.
    """

    files: ModelFiles
    d_model: int
    n_layers: int
    vocab_size: int
    max_positions: int | None
    dtype: str
    bos_id: int
    eos_ids: frozenset[int]
    special_ids: frozenset[int]
    config_hash: str
    tokenizer_hash: str

    @property
    def name(self) -> str:
        """The hub id or the local folder, as the user gave it."""
        return self.files.name

    @property
    def revision(self) -> str | None:
        """The hub commit that was loaded; None for a local folder."""
        return self.files.revision


@dataclasses.dataclass(frozen=True)
class Source:
    """What transformers' `from_pretrained` needs to find the files."""

    path: str
    arguments: dict[str, Any]


def locate(model: str, *, revision: str | None = None) -> ModelFiles:
    """The files of a local folder, or of a hub id at the commit `revision` names."""
    folder = Path(os.path.expanduser(model))
    if not model or folder.is_file():
        raise UserError(
            f"--model={model} is neither a model folder nor a hub id; {WAYS_ON}"
        )
    if not folder.is_dir():
        return _locate_on_hub(model, revision=revision or None)
    if revision:
        raise UserError(
            f"--revision={revision} needs a hub id, but --model={model} is a local "
            "folder; leave --revision out"
        )
    return ModelFiles(name=model, folder=folder)


def _locate_on_hub(model: str, *, revision: str | None) -> ModelFiles:
    from huggingface_hub import errors, model_info

    files = ModelFiles(name=model, revision=revision)
    try:
        model_info(model, revision=revision, timeout=HUB_TIMEOUT_S)
    except errors.RevisionNotFoundError:
        raise UserError(
            f"--revision={revision} is not a branch, tag or commit of --model={model}"
        ) from None
    except (errors.HFValidationError, errors.RepositoryNotFoundError):
        raise UserError(
            f"--model={model} is neither a folder here nor a model that the hub shows "
            f"you (a private one needs `hf auth login`); {WAYS_ON}"
        ) from None
    except connection_errors() as error:
        files = dataclasses.replace(files, cached_only=True)
        if find(files, "config.json") is None:
            raise UserError(
                f"--model={model} is not a folder here, is not in the hub's cache, and "
                f"the hub cannot be reached ({one_line(error)}); {WAYS_ON}"
            ) from None
    # This file is fetched by the revision's name, which the cache then remembers, and
    # lies in snapshots/<commit>/; all others are fetched by the commit.
    return dataclasses.replace(files, revision=need(files, "config.json").parent.name)


def find(files: ModelFiles, filename: str) -> Path | None:
    """The path of one file, fetched if need be; None if the model has no such file."""
    if files.folder is not None:
        path = files.folder / filename
        return path if path.is_file() else None
    from huggingface_hub import errors, hf_hub_download

    try:
        path = hf_hub_download(
            files.name,
            filename,
            revision=files.revision,
            local_files_only=files.cached_only,
        )
    except errors.EntryNotFoundError as error:
        lost = isinstance(error, errors.LocalEntryNotFoundError)
        if lost and not files.cached_only:
            raise _fetch_error(files, filename, error) from None
        return None
    except connection_errors() as error:
        raise _fetch_error(files, filename, error) from None
    return Path(path)


def connection_errors() -> tuple[type[Exception], ...]:
    """OSError, and the errors of the HTTP library, which differs by hub version."""
    from huggingface_hub.errors import HfHubHTTPError

    return (*HfHubHTTPError.__bases__, OSError)


def _fetch_error(files: ModelFiles, filename: str, error: Exception) -> UserError:
    from huggingface_hub.errors import GatedRepoError

    if isinstance(error, GatedRepoError):
        return UserError(
            f"--model={files.name} is gated: accept its terms on its hub page and log "
            f"in with `hf auth login`, or {WAYS_ON}"
        )
    return UserError(
        f"{filename} of --model={files.name} cannot be fetched ({one_line(error)}); "
        f"try again, or {WAYS_ON}"
    )


def need(files: ModelFiles, filename: str) -> Path:
    """The path of a file that the model must have."""
    path = find(files, filename)
    if path is None:
        raise UserError(f"--model={files.name} has no {filename}; {WAYS_ON}")
    return path


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a model's file of at most 64 MiB; it may hold infinities."""
    return read_object(path, limit=_JSON_LIMIT, strict=False)


def read_vocab_size(files: ModelFiles) -> int:
    """The number of token ids that the model knows."""
    config = files.config
    sizes = {**config, **config.get("text_config", {})}
    if "vocab_size" in sizes:
        return sizes["vocab_size"]
    from transformers import AutoConfig

    source = transformers_source(files)
    filled = AutoConfig.from_pretrained(source.path, **source.arguments)
    return filled.get_text_config().vocab_size


def weight_files(files: ModelFiles) -> list[Path]:
    """model.safetensors, or every shard that its index names."""
    single = find(files, "model.safetensors")
    if single is not None:
        return [single]
    index = find(files, "model.safetensors.index.json")
    if index is None:
        raise UserError(
            f"--model={files.name} has no model.safetensors, which --backend=jax "
            "needs; --backend=transformers also reads pytorch_model.bin"
        )
    names = read_json(index).get("weight_map")
    shards = set(names.values()) if isinstance(names, dict) else {""}
    for name in shards:
        # `weight_map` may be anyone's: its names must not lead out of the folder.
        inside = isinstance(name, str) and name not in ("", "..")
        if not inside or Path(name).name != name:
            raise UserError(f"{index} names {str(name)[:80]!r}, not a file beside it")
    return [need(files, shard) for shard in sorted(shards)]


def transformers_source(files: ModelFiles) -> Source:
    """The same files for transformers; code that comes with a model is never run."""
    return Source(
        path=str(files.folder or files.name),
        arguments={
            "revision": files.revision or "main",
            "local_files_only": files.cached_only,
            "trust_remote_code": False,
        },
    )


def tokenizer_source(files: ModelFiles) -> Source:
    """`transformers_source`, if there is a tokenizer."""
    if not _tokenizer_paths(files):
        raise UserError(f"--model={files.name} has no tokenizer.json; {WAYS_ON}")
    return transformers_source(files)


def _tokenizer_paths(files: ModelFiles) -> list[Path]:
    for filenames in TOKENIZER_FILES:
        paths = [find(files, filename) for filename in filenames]
        if None not in paths:
            return [path for path in paths if path is not None]
    return []


def model_facts(
    files: ModelFiles,
    config: dict[str, Any],
    *,
    d_model: int,
    n_layers: int,
    dtype: str,
) -> ModelFacts:
    """What a backend knows of a model from its files; `config` has the special ids."""
    bos, eos, pad = (_ids(config.get(f"{t}_token_id")) for t in ("bos", "eos", "pad"))
    if not bos + eos:
        raise UserError(
            f"config.json of --model={files.name} names no bos_token_id and no "
            "eos_token_id; add the one that starts a text"
        )
    return ModelFacts(
        files=files,
        d_model=d_model,
        n_layers=n_layers,
        vocab_size=config["vocab_size"],
        max_positions=config.get("max_position_embeddings", config.get("n_positions")),
        dtype=dtype,
        bos_id=(bos + eos)[0],
        eos_ids=frozenset(eos),
        special_ids=frozenset(bos + eos + pad),
        config_hash=_config_hash(files.config),
        tokenizer_hash=_tokenizer_hash(files),
    )


def generation_eos_ids(files: ModelFiles) -> frozenset[int]:
    """The EOS ids of generation_config.json, or none without that file. Chat models
    list the end of a turn there, which config.json lacks."""
    path = find(files, "generation_config.json")
    return frozenset(_ids(read_json(path).get("eos_token_id")) if path else ())


def _ids(value: int | list[int] | None) -> list[int]:
    """Token ids as a list: some models have several EOS ids, some say -1 for none."""
    ids = value if isinstance(value, list) else [value]
    return [i for i in ids if i is not None and i >= 0]


def _config_hash(config: dict[str, Any]) -> str:
    """sha256 of the config as canonical JSON, without the keys that saving it again
    changes."""
    stable = {key: config[key] for key in config if key not in VOLATILE_KEYS}
    text = json.dumps(stable, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _tokenizer_hash(files: ModelFiles) -> str:
    """sha256 of the tokenizer's own files; of nothing if there is no tokenizer."""
    digest = hashlib.sha256()
    for path in _tokenizer_paths(files):
        digest.update(path.read_bytes())
    return digest.hexdigest()
