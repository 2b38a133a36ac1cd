"""manifest.json: what lies in a folder of activations and how it was made.

The file is read like data from a stranger: its size is bounded, and every key, type and
range is checked. Equal settings give equal bytes.
"""

import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from vsae_jax.config.sites import Hook, read_hook
from vsae_jax.system.errors import UserError, one_line
from vsae_jax.system.strict_json import refuse_constant

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
MAX_MANIFEST_BYTES = 64 * 2**20
# What a row is stored as, and what it is read as.
STORED = {"bfloat16": np.uint16, "float16": np.float16, "float32": np.float32}
READ = STORED | {"bfloat16": ml_dtypes.bfloat16}
_HASH = "sha256"
# Fields that older folders lack.
_NEWER = ("lm_dtype", "weights_hash")
_DERIVED = ("dropped_positions", "rows_per_context", "n_contexts", "n_rows")


@dataclass(frozen=True)
class Shard:
    """One pair of files: its size and the sha256 of each whole file."""

    contexts: int
    rows: int
    activations_sha256: str
    tokens_sha256: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What lies in a folder of activations and how it was made.

    model, dataset: hub id, or the absolute path of what was local.
    revision: the hub commit that was loaded, "" for a local model; `revision_asked` is
      what `--revision` said.
    num_tokens: tokens asked for; `n_contexts * context_length` is what there is.
    lm_dtype: of the language model's products; "" in older folders, which is float32.
    weights_hash: of a local model's weights; "" where it is not known.
    hook_name: where in the model, in TransformerLens' words; `layer` is its block.
    bos: `keep` and `drop` start every context with `bos_id`, `none` does not.
    center_residual: each row's mean over d_model was subtracted.
    mean, mean_squared_norm: `[d_model]` and scalar, over the rows as they are stored.
    complete: False until the last shard is there.
    """

    format_version: int = FORMAT_VERSION
    model: str
    revision: str
    revision_asked: str
    backend: str
    config_hash: str
    tokenizer_hash: str
    lm_dtype: str = ""
    weights_hash: str = ""
    hook_name: str
    layer: int
    d_model: int
    vocab_size: int
    dtype: str
    context_length: int
    bos: str
    bos_id: int
    special_ids: tuple[int, ...]
    skip_positions: int
    center_residual: bool
    dataset: str
    split: str
    text_column: str
    num_tokens: int
    shard_contexts: int
    complete: bool = False
    mean: tuple[float, ...] = ()
    mean_squared_norm: float = 0.0
    shards: tuple[Shard, ...] = ()

    def __post_init__(self):
        if problem := _problem(self):
            raise ValueError(problem)

    @property
    def hook(self) -> Hook:
        """Where in the model."""
        return read_hook(self.hook_name) or Hook(self.layer)

    @property
    def site(self) -> str:
        """The hook's site: resid_post, mlp_out or attn_out."""
        return self.hook.site

    @property
    def dropped_positions(self) -> int:
        """Leading positions of a context that have a token but no row."""
        return self.skip_positions + (self.bos == "drop")

    @property
    def rows_per_context(self) -> int:
        return self.context_length - self.dropped_positions

    @property
    def row_bytes(self) -> int:
        """Bytes of one row on the disk."""
        return self.d_model * np.dtype(STORED[self.dtype]).itemsize

    @property
    def n_contexts(self) -> int:
        return sum(shard.contexts for shard in self.shards)

    @property
    def n_rows(self) -> int:
        return self.n_contexts * self.rows_per_context

    @property
    def hash(self) -> str:
        """sha256 of manifest.json without the line that holds it."""
        return hashlib.sha256(_lines(self._values())).hexdigest()

    def to_bytes(self) -> bytes:
        """manifest.json: equal manifests, equal bytes; no time, no output path."""
        return _lines(self._values() | {_HASH: self.hash})

    def _values(self) -> dict[str, Any]:
        values = dataclasses.asdict(self)
        for name in _NEWER:  # as in older folders
            if not values[name]:
                del values[name]
        return values | {name: getattr(self, name) for name in _DERIVED}

    @classmethod
    def from_bytes(cls, data: bytes) -> "Manifest":
        """The inverse of `to_bytes`; raises ValueError saying what is wrong."""
        values = json.loads(data, parse_constant=refuse_constant)
        if not isinstance(values, dict):
            raise ValueError("it is not a JSON object")
        if values.get("format_version") != FORMAT_VERSION:
            raise ValueError(
                f"format_version is {values.get('format_version')!r} and this vsae_jax "
                f"reads {FORMAT_VERSION}"
            )
        derived = {name: values.pop(name, None) for name in _DERIVED}
        said = values.pop(_HASH, None)  # older folders have none
        manifest = _typed(dict.fromkeys(_NEWER, "") | values, cls, "the manifest")
        for name, value in derived.items():
            if value != getattr(manifest, name):
                raise ValueError(f"{name} is {value!r}, which the rest contradicts")
        if said not in (None, manifest.hash):
            raise ValueError(f"it was edited: its {_HASH} does not fit")
        return manifest


def _lines(values: dict[str, Any]) -> bytes:
    """A JSON object with a line for every name."""
    lines = [f"{json.dumps(k)}: {json.dumps(v)}" for k, v in values.items()]
    return ("{\n" + ",\n".join(lines) + "\n}\n").encode()


def _typed(value: Any, hint: Any, name: str) -> Any:
    """`value` from JSON as a `hint`: a dataclass, a `tuple[item, ...]` or a scalar."""
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        fields = {field.name: field.type for field in dataclasses.fields(hint)}
        keys = value.keys() if isinstance(value, dict) else set()
        if wrong := sorted(fields.keys() ^ keys):
            raise ValueError(f"{name} lacks or does not know {', '.join(wrong)}")
        return hint(**{k: _typed(value[k], t, k) for k, t in fields.items()})
    if hasattr(hint, "__args__") and isinstance(value, list):
        return tuple(_typed(item, hint.__args__[0], name) for item in value)
    if hint is float and type(value) is int:
        value = float(value)
    if type(value) is not hint:
        raise ValueError(f"{name} is {str(value)[:40]!r}, not of type {hint}")
    return value


def _problem(m: Manifest) -> str:
    """What is impossible about a manifest, or "" if nothing is."""
    if m.dtype not in STORED:
        return f"dtype is {m.dtype!r}, not one of {', '.join(STORED)}"
    if m.bos not in ("keep", "drop", "none"):
        return f"bos is {m.bos!r}, not keep, drop or none"
    if min(m.layer, m.skip_positions, m.num_tokens, m.bos_id) < 0:
        return "layer, skip_positions, num_tokens or bos_id is negative"
    if m.hook.layer != m.layer:
        return f"it was edited: hook_name is {m.hook_name!r} and layer {m.layer}"
    if min(m.d_model, m.vocab_size, m.shard_contexts, m.rows_per_context) < 1:
        return "d_model, vocab_size, shard_contexts or rows_per_context is below 1"
    if len(m.mean) != (m.d_model if m.shards else 0):
        return f"mean has {len(m.mean)} entries for d_model={m.d_model}"
    if not all(map(math.isfinite, (*m.mean, m.mean_squared_norm))):
        return "mean or mean_squared_norm is not finite"
    for i, shard in enumerate(m.shards):
        full = shard.contexts == m.shard_contexts
        last = i == len(m.shards) - 1 and 1 <= shard.contexts < m.shard_contexts
        if not full and not last or shard.rows != shard.contexts * m.rows_per_context:
            return f"shard {i} cannot have contexts={shard.contexts} rows={shard.rows}"
    return ""


def read_manifest(folder: Path) -> Manifest | None:
    """The folder's manifest; None where there is none."""
    path = folder / MANIFEST
    try:
        with path.open("rb") as file:
            data = file.read(MAX_MANIFEST_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        if len(data) > MAX_MANIFEST_BYTES:
            raise ValueError(f"it is larger than {MAX_MANIFEST_BYTES} bytes")
        return Manifest.from_bytes(data)
    except (ValueError, OverflowError, RecursionError) as error:
        raise UserError(
            f"{path} is not a manifest that this version reads: {one_line(error)}; "
            "make the activations again in another folder"
        ) from None
