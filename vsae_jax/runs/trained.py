"""A trained autoencoder: read from a run folder, used, and saved."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, Self, overload

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from vsae_jax.autoencoder.reader import Reader
from vsae_jax.config import RUNTIME_FIELDS, Hook, SAEConfig, TrainConfig, read_hook
from vsae_jax.config.fields import from_json, to_json
from vsae_jax.lm import LanguageModel, load_tokenizer
from vsae_jax.lm.token_text import token_texts
from vsae_jax.runs.folder import (
    CONFIG,
    EVALS,
    METRICS,
    PARAMETERS,
    read_json,
    read_metrics,
    read_parameters,
    write_autoencoder,
)
from vsae_jax.system.errors import UserError

# What evaluation reads from a run's `data`. Any of it may be unknown for rows that came
# without their language model, or for autoencoders from elsewhere.
_DATA = {
    "manifest": str,
    "model": str,
    "revision": str,
    "dataset": str,
    "hook_name": str,
    "layer": int,
    "context_length": int,
    "bos": str,
    "dropped_positions": int,
    "center_residual": bool,
    "held_out_contexts": list,
}


class TopLatents(NamedTuple):
    """The strongest latents of each token of a text, the largest |f| first: their
    numbers and values. `print` shows a table of those that fire."""

    tokens: list[str]
    latents: Int[np.ndarray, "tokens n"]
    values: Float[np.ndarray, "tokens n"]

    def __str__(self) -> str:
        cells = [
            [repr(token)]
            + [f"{i} ({v:.3g})" if v else "" for i, v in zip(*row, strict=True)]
            for token, *row in zip(*self, strict=True)
        ]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        return "\n".join(
            "  ".join(f"{c:{w}}" for c, w in zip(line, widths, strict=True)).rstrip()
            for line in cells
        )


@dataclass(frozen=True, eq=False, repr=False)
class TrainedSAE:
    """A trained autoencoder, ready to use on raw activations.

    `encode`, `decode` and calling it take NumPy arrays, JAX arrays and torch tensors
    with any leading axes, and return the same kind, in float32.

    folder: where its files are.
    sae: shapes, selection rule and k.
    variables: `params` and `norm`, as `sae.encode` takes them.
    data: what it was trained on, as far as known: the activations' manifest, language
      model, layer, text, held-out contexts.
    train: the training config; None for what was not trained here.
    layer_norm: each row is normalised first (OpenAI); `decode` then needs the rows.
    latent_scale: its latents are this many times those of the imported original.
    notes: what else one has to know about it.
    source: format and name of the files that it was imported from.
    explained_variance: on held-out tokens if it was evaluated, else in the last
      interval of its training; None where neither is known.
    """

    folder: Path
    sae: SAEConfig
    variables: dict[str, dict[str, Array]]
    data: dict[str, Any]
    train: TrainConfig | None = None
    layer_norm: bool = False
    latent_scale: float = 1.0
    notes: tuple[str, ...] = ()
    source: dict[str, Any] = field(default_factory=dict)
    explained_variance: float | None = None

    @cached_property
    def reader(self) -> Reader:
        """How it reads a language model."""
        return Reader(
            self.variables,
            self.sae,
            hook=hook_of(self.data),
            center=bool(self.data.get("center_residual")),
            layer_norm=self.layer_norm,
            has_bos=self.data.get("bos") != "none",
            dropped_positions=self.data.get("dropped_positions") or 0,
        )

    @property
    def config(self) -> SAEConfig:
        """Shapes, selection rule and k."""
        return self.sae

    @property
    def d_model(self) -> int:
        """Width of the activations."""
        return self.sae.d_model

    @property
    def d_sae(self) -> int:
        """Number of latents."""
        return self.sae.d_sae

    @property
    def k(self) -> int | None:
        """Latents kept per row (batch_topk: on average); None where k is not fixed."""
        return self.sae.k if self.sae.has_k else None

    @property
    def w_dec(self) -> Float[np.ndarray, "d_sae d_model"]:
        """What one unit of each latent adds to raw activations (with a LayerNorm: to
        the normalised ones)."""
        return self.reader.directions

    @property
    def params(self) -> dict[str, Array]:
        """w_enc [d_model, d_sae], b_enc, w_dec [d_sae, d_model], b_dec, ..., in units
        of the scaled input. (The property `w_dec` is in units of x.)"""
        return self.variables["params"]

    def encode(self, x: Float[Any, "... d_model"]) -> Float[Any, "... d_sae"]:
        """Latents of raw activations, at the mean: no noise.

        Raises ValueError if the last axis is not d_model long, and for numbers that are
        not floats. Gradients go through JAX arrays, but not through torch tensors.
        """
        x, as_given = self._given(x)
        return as_given(self.reader.encode(x))

    def decode(
        self,
        f: Float[Any, "... d_sae"],
        *,
        rows: Float[Any, "... d_model"] | None = None,
    ) -> Float[Any, "... d_model"]:
        """Raw activations from latents; `rows`: what was encoded, for a LayerNorm.

        Raises ValueError as `encode` does, and if a LayerNorm lacks its rows.
        """
        f, as_given = self._given(f)
        x = None if rows is None else self._given(rows)[0]
        return as_given(self.reader.decode(f, rows=x))

    def __call__(self, x: Float[Any, "... d_model"]) -> Float[Any, "... d_model"]:
        """x_hat of raw activations."""
        x, as_given = self._given(x)
        return as_given(self.reader.decode(self.reader.encode(x), rows=x))

    @overload
    def top_latents(
        self, texts: str, lm: LanguageModel, *, n: int = 5
    ) -> TopLatents: ...

    @overload
    def top_latents(
        self, texts: Sequence[str], lm: LanguageModel, *, n: int = 5
    ) -> list[TopLatents]: ...

    def top_latents(self, texts, lm, *, n=5):
        """The `n` strongest latents of each token of a text, or of each of several.

        Each text is a context of its own, with BOS if the autoencoder was trained with
        it. Tokens at positions that it was not trained on are left out. Raises
        ValueError if its layer is not known, or if `lm` has another d_model.
        """
        if isinstance(texts, str):
            return self.top_latents([texts], lm, n=n)[0]
        if not isinstance(lm, LanguageModel):
            raise UserError(
                f"lm is a {type(lm).__name__}; give vsae_jax.language_model(path)"
            )
        reader, tokenizer = self.reader, load_tokenizer(lm.files)
        lm.check(reader.place)
        begin = [lm.bos_id] if reader.has_bos else []
        skip = max(len(begin), reader.dropped_positions)
        ids = [
            begin + tokenizer.encode(text, add_special_tokens=False) for text in texts
        ]
        longest, most = max(map(len, ids), default=0), lm.max_positions
        if not longest:
            raise UserError("there is no token in the texts; give at least one")
        if most is not None and longest > most:
            raise UserError(
                f"a text has {longest} tokens and {lm.name} takes {most}: cut it"
            )
        # The padding after a text does not change what is before it.
        padded = np.zeros((len(ids), longest), np.int32)
        for row, own in zip(padded, ids, strict=True):
            row[: len(own)] = own
        (there,) = lm.at(padded, [reader.place])
        f = np.asarray(reader.encode(reader.rows(jnp.asarray(there))))
        f = f.reshape(*padded.shape, self.d_sae)
        names = token_texts(tokenizer, padded.ravel().tolist())
        return [
            _strongest([names[i] for i in own[skip:]], row[skip : len(own)], n)
            for own, row in zip(ids, f, strict=True)
        ]

    def save(self, folder: str | Path) -> Path:
        """Writes config.json and sae.safetensors into a new folder, which
        `vsae_jax.load` and every command can open; returns the folder."""
        folder = Path(folder)
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(f"{folder} exists already; name a new folder")
        folder.mkdir(parents=True, exist_ok=True)
        write_autoencoder(
            folder,
            self.sae,
            self.variables,
            data=self.data,
            train=None if self.train is None else to_json(self.train),
            source=self.source or {"format": "vsae_jax", "name": self.folder.name},
            notes=list(self.notes),
            layer_norm=self.layer_norm,
            latent_scale=self.latent_scale,
        )
        return folder

    def in_float32(self) -> Self:
        """The same autoencoder, computing in float32."""
        return replace(self, sae=replace(self.sae, dtype="float32"))

    def __repr__(self) -> str:
        kind = self.train.variant if self.train else self.sae.sparsity
        kept = "" if self.k is None else f", k {self.k}"
        lines = [f"TrainedSAE {kind}: d_model {self.d_model}, d_sae {self.d_sae}{kept}"]
        if self.data.get("model"):
            lines.append(f"of {self.data['model']}, {self.data.get('hook_name')}")
        if self.train:
            c = self.train
            rows = f"{c.steps * c.batch_size:,} rows"
            lines.append(f"trained on {rows} in {c.steps:,} steps, seed {c.seed}")
        if self.explained_variance is not None:
            evaluated = (self.folder / EVALS / "core.json").is_file()
            where = "on held-out tokens" if evaluated else "in training"
            lines.append(f"explained variance {self.explained_variance:.4f} {where}")
        saved = self.folder.is_dir()
        return "\n  ".join([*lines, f"in {self.folder}" if saved else "not saved"])

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: Any) -> Self:
        return self  # it is immutable

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "a TrainedSAE is not pickled: a pickle runs code when it is opened, and "
            "breaks with the next version; write it with sae.save(folder), read it "
            "with vsae_jax.load(folder)"
        )

    def _given(self, x: Any) -> tuple[Any, Callable[[Array], Any]]:
        """An array as JAX takes it, and a function that turns a result into an array of
        the given kind."""
        if isinstance(x, jax.Array):
            return x, lambda out: out
        torch = sys.modules.get("torch")
        if torch is None or not isinstance(x, torch.Tensor):
            return x, np.array
        x = x.detach()
        # JAX and torch share memory on a device that both use.
        shared = x.is_cuda and jax.default_backend() == "gpu"
        near = x if shared else x.cpu()
        (place,) = self.variables["norm"]["scale"].devices()

        def as_tensor(out: Array) -> Any:
            out = out if shared else jax.device_put(out, jax.devices("cpu")[0])
            return torch.from_dlpack(out).to(x.device)

        return jax.device_put(jnp.from_dlpack(near.contiguous()), place), as_tensor


def _strongest(
    tokens: list[str], f: Float[np.ndarray, "tokens d_sae"], n: int
) -> TopLatents:
    latents = np.argsort(-np.abs(f), axis=1, kind="stable")[:, :n]
    return TopLatents(tokens, latents, np.take_along_axis(f, latents, 1))


def open_run(folder: str | Path) -> TrainedSAE:
    """A finished run from its folder, or what `save` or `convert` wrote there."""
    folder = Path(folder)
    where = folder / CONFIG
    if not where.is_file():
        raise UserError(f"{folder} is not a run folder: it has no {CONFIG}")
    if not (folder / PARAMETERS).is_file():
        raise UserError(f"the run in {folder} is not finished: train it to the end")
    stored = read_json(where)
    imported = stored.get("imported")
    needed = {"sae", "data"} if isinstance(imported, dict) else {"train", "sae", "data"}
    if missing := needed - stored.keys():
        raise UserError(f"{where} lacks {', '.join(sorted(missing))}")
    config = from_json(SAEConfig, stored["sae"], where=str(where))
    train = stored.get("train")
    if train is not None or "train" in needed:
        train = from_json(TrainConfig, train, where=str(where), may_lack=RUNTIME_FIELDS)
    _check_data(stored["data"], where, whole=bool(train and train.activations))
    return TrainedSAE(
        folder=folder,
        train=train,
        sae=config,
        data=stored["data"],
        variables=read_parameters(folder / PARAMETERS, config),
        explained_variance=_explained_variance(folder),
        **_of_import(imported if isinstance(imported, dict) else {}, where),
    )


def _of_import(imported: dict[str, Any], where: Path) -> dict[str, Any]:
    """The fields that only an autoencoder from elsewhere has."""
    source = imported.get("source")
    notes, times = imported.get("notes", []), imported.get("latent_scale", 1.0)
    if not isinstance(notes, list) or type(times) is not float or not times > 0:
        raise UserError(f"{where}: notes or latent_scale under imported is wrong")
    return {
        "layer_norm": imported.get("layer_norm") is True,
        "latent_scale": times,
        "notes": tuple(line for line in notes if isinstance(line, str)),
        "source": source if isinstance(source, dict) else {},
    }


def _check_data(data: Any, where: Path, *, whole: bool) -> None:
    """Refuses values of a wrong type, and with `whole` also missing ones."""
    if not isinstance(data, dict):
        data, whole = {}, True
    known: dict[str, Any] = {
        n: data.get(n) for n in _DATA if whole or data.get(n) is not None
    }
    wrong = [n for n, value in known.items() if type(value) is not _DATA[n]]
    dropped = known.get("dropped_positions", 0)
    if not wrong and min(known.get("layer", 0), dropped) < 0:
        wrong.append("layer or dropped_positions")
    hook = None if wrong else read_hook(known.get("hook_name"))
    if hook is not None and hook.layer != known.get("layer", hook.layer):
        wrong.append("hook_name or layer")
    if not wrong and known.get("context_length", dropped + 1) <= dropped:
        wrong.append("context_length")
    if not wrong and not _is_range(known.get("held_out_contexts", [0, 1])):
        wrong.append("held_out_contexts")
    if wrong:
        names = ", ".join(wrong)
        raise UserError(f"{where}: data does not match this version at {names}")


def _is_range(ends: list[Any]) -> bool:
    """Whether a list from JSON is [start, stop] of at least one context."""
    return [type(i) for i in ends] == [int, int] and 0 <= ends[0] < ends[1]


def _explained_variance(folder: Path) -> float | None:
    """The explained variance from `evaluate`'s core, or else from the last line of
    metrics; None where it cannot be read, as nothing depends on it."""
    core, metrics = folder / EVALS / "core.json", folder / METRICS
    try:
        if core.is_file():
            found = read_json(core)["metrics"]["explained_variance"]
        else:
            found = read_metrics(metrics)[-1]["explained_variance"]
    except (OSError, LookupError, TypeError, UserError):
        return None
    return found if isinstance(found, float) else None


def hook_of(data: dict[str, Any]) -> Hook | None:
    """Where in a language model the rows of a run's `data` are from; the stream after
    the block, if only the layer is known. None for a hook that is not known here."""
    name, layer = data.get("hook_name"), data.get("layer")
    if name is None:
        return None if layer is None else Hook(layer)
    return read_hook(name)
