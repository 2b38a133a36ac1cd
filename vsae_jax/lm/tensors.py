"""A model's parameters from its safetensors files, without torch."""

import re

# Importing jax also gives NumPy the bfloat16 that safetensors asks it for.
import jax  # noqa: F401
import numpy as np
from safetensors import SafetensorError, safe_open

from vsae_jax.lm.decoder import Params, Spec, block_arrays, outer_arrays, stack
from vsae_jax.lm.families import USE_TRANSFORMERS, Family, Read
from vsae_jax.lm.files import ModelFiles, weight_files
from vsae_jax.system.errors import UserError, one_line

# Constants that older checkpoints carry beside the weights.
_BUFFER = re.compile(r".*((attn|attention)\.(masked_)?bias|rotary_emb\.inv_freq)")
# Besides `w_...`, the arrays that enter products; all others stay in float32.
_MATRICES = ("embed", "unembed")


def tensor_names(
    family: Family, spec: Spec
) -> tuple[dict[str, tuple[str, ...]], dict[str, tuple[str, ...]]]:
    """Our array -> the file's tensors that it is made of, outside the blocks and in
    one."""
    return (
        {name: _names(family, name) for name in outer_arrays(spec)},
        {name: _names(family, name) for name in block_arrays(spec)},
    )


def _names(family: Family, name: str) -> tuple[str, ...]:
    module = re.sub("^[wb]_|_(scale|bias)$", "", name)
    kind = "bias" if name.startswith("b_") or name.endswith("_bias") else "weight"
    modules = family.names[module]
    if isinstance(modules, str):
        modules = (modules,)
    return tuple(f"{module}.{kind}" for module in modules)


def read_params(files: ModelFiles, family: Family, read: Read, *, dtype: str) -> Params:
    """The parameters as NumPy arrays, matrices in `dtype` and all others in float32;
    `blocks` as `decoder.stack` puts them together."""
    spec = read.spec
    outer, block = tensor_names(family, spec)
    layers = [family.layers.format(i) for i in range(spec.n_layers)]
    tensors = _Tensors(files, family, spec, dtype=dtype)
    shapes = outer_arrays(spec) | block_arrays(spec)
    for name, parts in outer.items():
        tensors.check(name, parts, shapes[name])
    for layer in layers:
        for name, parts in block.items():
            tensors.check(name, [layer + part for part in parts], shapes[name])
    tensors.check_no_more()
    params: Params = {name: tensors.read(name, parts) for name, parts in outer.items()}
    if spec.tied:
        params["unembed"] = np.ascontiguousarray(params["embed"].T)
    params["blocks"] = read.per_layer | {
        name: stack(
            [tensors.read(name, [layer + p for p in parts]) for layer in layers]
        )
        for name, parts in block.items()
    }
    return params


class _Tensors:
    """The tensors of all weight files by name, read one at a time."""

    def __init__(self, files: ModelFiles, family: Family, spec: Spec, *, dtype: str):
        self._model, self._family, self._spec = files.name, family, spec
        self._dtype = np.dtype(dtype)
        self._head = _names(family, "unembed")[0]
        # Full name of a tensor -> the file, and its name there.
        self._places: dict[str, tuple[safe_open, str]] = {}
        self._expected: set[str] = {self._head} if spec.tied else set()
        for path in weight_files(files):
            try:
                file = safe_open(path, framework="numpy")
            except (SafetensorError, OSError) as error:
                raise UserError(f"{path} cannot be read: {one_line(error)}") from None
            for name in file.keys():
                self._places[self._full(name)] = (file, name)

    def _full(self, name: str) -> str:
        """A tensor's name with the prefix that files of the bare model lack."""
        prefix = self._family.prefix
        bare = not name.startswith(prefix) and name != self._head
        return prefix + name if bare else name

    def check(
        self, ours: str, parts: list[str] | tuple[str, ...], shape: tuple[int, ...]
    ):
        """Refuses parts that are missing or do not make an array of the shape."""
        for name, width in zip(parts, self._widths(parts, shape[-1]), strict=True):
            expected = (*shape[:-1], width)
            expected = expected[::-1] if self._is_transposed(ours) else expected
            if name not in self._places:
                raise self._mismatch(f"the tensor {name} is missing")
            file, key = self._places[name]
            found = tuple(file.get_slice(key).get_shape())
            if found != expected:
                raise self._mismatch(f"the tensor {name} is {found}, not {expected}")
            self._expected.add(name)

    def check_no_more(self) -> None:
        """Refuses a tensor that no check asked for."""
        for name in sorted(self._places.keys() - self._expected):
            if not _BUFFER.fullmatch(name):
                own = self._places[name][1]
                model_type = self._family.model_type
                raise self._mismatch(f"the tensor {own} is not {model_type}'s")

    def read(self, ours: str, parts: list[str] | tuple[str, ...]) -> np.ndarray:
        """One of our arrays."""
        arrays = []
        for name in parts:
            file, key = self._places[name]
            array = file.get_tensor(key)
            arrays.append(array.T if self._is_transposed(ours) else array)
        array = np.concatenate(arrays, axis=-1) if len(arrays) > 1 else arrays[0]
        if self._family.by_head and ours in ("w_qkv", "b_qkv"):
            array = _heads_last(array, n_heads=self._spec.n_heads)
        matrix = ours.startswith("w_") or ours in _MATRICES
        array = np.ascontiguousarray(array).astype(
            self._dtype if matrix else np.float32
        )
        return (
            array + np.float32(self._family.norm_offset) if "_scale" in ours else array
        )

    def _is_transposed(self, ours: str) -> bool:
        if ours == "unembed":
            return True
        return self._family.transposed and ours.startswith("w_")

    def _widths(self, parts: list[str] | tuple[str, ...], width: int) -> list[int]:
        if len(parts) == 1:
            return [width]
        keys = self._spec.n_kv_heads * self._spec.d_head
        return [width - 2 * keys, keys, keys]

    def _mismatch(self, what: str) -> UserError:
        return UserError(
            f"the weights of --model={self._model} do not fit its config.json: {what}; "
            f"restore the original files, or {USE_TRANSFORMERS}"
        )


def _heads_last(array: np.ndarray, *, n_heads: int) -> np.ndarray:
    """Head by head q, k, v -> all q, all k, all v, along the last axis."""
    by_head = array.reshape(*array.shape[:-1], n_heads, 3, -1)
    return np.moveaxis(by_head, -2, -3).reshape(array.shape)
