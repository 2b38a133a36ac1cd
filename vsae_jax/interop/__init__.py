"""Other libraries' files: one module a format, all through one canonical form."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

from vsae_jax.interop import (
    dictionary_learning,
    gemma_scope,
    openai,
    run_folder,
    saelens,
    sidecar,
    sparsify,
)
from vsae_jax.interop.canonical import Autoencoder
from vsae_jax.system.errors import UserError


class Readable(Protocol):
    """The names that the module of a format that is read has.

    weights: the file of the weights, where a folder is of this format.
    """

    @property
    def NAME(self) -> str: ...
    @property
    def weights(self) -> Callable[[Path], Path | None]: ...
    def read(self, folder: Path) -> Autoencoder: ...


class Format(Readable, Protocol):
    """The names that the module of a format that is also written has.

    SAYS: for a selection rule that its files cannot say, the one that they say instead:
      the two are equal where no kept value is negative.
    """

    @property
    def SAYS(self) -> Mapping[str, str]: ...
    def rewritten(self, ae: Autoencoder) -> Autoencoder: ...
    def write(self, ae: Autoencoder, folder: Path) -> Path: ...


FORMATS: dict[str, Format] = {
    "vsae_jax": run_folder,
    "saelens": saelens,
    "dictionary_learning": dictionary_learning,
    "sparsify": sparsify,
    "openai": openai,
}
READ: dict[str, Readable] = {**FORMATS, "gemma_scope": gemma_scope}
_EXPECTED = (
    "config.json with sae.safetensors (vsae_jax), cfg.json with "
    "sae_weights.safetensors (saelens) or sae.safetensors (sparsify), config.json with "
    "ae.pt (dictionary_learning), params.npz or params.safetensors (gemma_scope), or "
    "one .pt file alone (openai)"
)


def recognised(folder: Path) -> Readable:
    """The format of a folder, by its files."""
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; expected {_EXPECTED}")
    found = [f for f in READ.values() if f.weights(folder)]
    if len(found) == 1:
        return found[0]
    if found:
        names = " and ".join(f.NAME for f in found)
        raise UserError(f"{folder} looks like {names}; leave the files of one")
    inside = [f.name for f in sorted(folder.iterdir())[:1000] if f.is_dir()]
    inside = [n for n in inside if any(f.weights(folder / n) for f in READ.values())]
    hint = f"; name one of its folders: {', '.join(inside[:5])}" if inside else ""
    raise UserError(f"{folder} holds no autoencoder{hint}; expected {_EXPECTED}")


def read(folder: str | Path) -> Autoencoder:
    """The autoencoder of a folder of any format, as it was before an export of ours."""
    folder = Path(folder)
    module = recognised(folder)
    ae = module.read(folder)
    weights = module.weights(folder)
    if module is run_folder or weights is None:
        return ae
    return sidecar.apply(ae, folder, weights=weights)


__all__ = ["FORMATS", "READ", "Autoencoder", "Format", "Readable", "read", "recognised"]
