"""GPT-NeoX on disk: config.json and safetensors, read without torch."""

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# Importing jax also gives NumPy the bfloat16 that safetensors asks it for.
import jax
import numpy as np
from safetensors import SafetensorError, safe_open

from vsae_jax.lm.files import ModelFiles, weight_files
from vsae_jax.system.errors import UserError, one_line

Params = dict[str, Any]

_tanh_gelu = functools.partial(jax.nn.gelu, approximate=True)
ACTIVATIONS = {
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_new": _tanh_gelu,
    "gelu_fast": _tanh_gelu,
    "gelu_pytorch_tanh": _tanh_gelu,
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
}
REQUIRED_KEYS = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
)
# Constants that older checkpoints carry beside the weights.
BUFFER = re.compile(r".*(attention\.(masked_)?bias|rotary_emb\.inv_freq)")


@dataclass(frozen=True)
class NeoXConfig:
    """The static part of a model, in this library's words."""

    vocab_size: int
    d_model: int
    n_layers: int
    n_heads: int
    d_mlp: int
    activation: str
    layer_norm_eps: float
    rotary_ndims: int
    rotary_base: float
    parallel_residual: bool
    attention_bias: bool
    tied: bool


def read_neox_config(config: Mapping[str, Any]) -> NeoXConfig:
    """From config.json, in the spelling of transformers 5 or an older one."""
    absent = [key for key in REQUIRED_KEYS if key not in config]
    if absent:
        raise UserError(f"config.json lacks {', '.join(absent)}; restore the original")
    d_model, n_heads = config["hidden_size"], config["num_attention_heads"]
    if d_model % n_heads:
        raise UserError(
            f"config.json: hidden_size={d_model} must be a multiple of "
            f"num_attention_heads={n_heads}"
        )
    activation = config.get("hidden_act", "gelu")
    if activation not in ACTIVATIONS:
        raise UserError(
            f"--backend=jax does not know hidden_act={activation!r}, only "
            f"{', '.join(ACTIVATIONS)}; use --backend=transformers"
        )
    rotary_base, rotary_share = _rotary(config)
    return NeoXConfig(
        vocab_size=config["vocab_size"],
        d_model=d_model,
        n_layers=config["num_hidden_layers"],
        n_heads=n_heads,
        d_mlp=config["intermediate_size"],
        activation=activation,
        layer_norm_eps=config.get("layer_norm_eps", 1e-5),
        rotary_ndims=int(d_model // n_heads * rotary_share),
        rotary_base=rotary_base,
        parallel_residual=config.get("use_parallel_residual", True),
        attention_bias=config.get("attention_bias", True),
        tied=config.get("tie_word_embeddings", False),
    )


def _rotary(config: Mapping[str, Any]) -> tuple[float, float]:
    """The rotary base and the share of each head that is rotated."""
    new = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = new.get("rope_type", new.get("type", "default"))
    if kind != "default":
        raise UserError(
            f"--backend=jax does not know the rotary scaling {kind!r}; "
            "use --backend=transformers"
        )
    base = new.get("rope_theta", config.get("rotary_emb_base", 10000.0))
    share = new.get("partial_rotary_factor", config.get("rotary_pct", 0.25))
    return float(base), float(share)


def read_params(files: ModelFiles, *, config: NeoXConfig) -> Params:
    """The weights as float32 NumPy arrays; `blocks` are stacked on a leading axis."""
    tensors = _Tensors(files)
    outer, block = outer_tensors(config), block_tensors(config)
    layers = [f"gpt_neox.layers.{i}." for i in range(config.n_layers)]
    expected = dict(outer.values())
    for layer in layers:
        expected |= {layer + suffix: shape for suffix, shape in block.values()}
    tensors.check(expected, tied=config.tied)
    params: Params = {key: tensors.read(name) for key, (name, _) in outer.items()}
    params["blocks"] = {
        key: np.stack([tensors.read(layer + suffix) for layer in layers])
        for key, (suffix, _) in block.items()
    }
    return params


def outer_tensors(config: NeoXConfig) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Our name -> (the file's name, shape), outside the blocks."""
    d, vocab = config.d_model, config.vocab_size
    tensors = {
        "embed": ("gpt_neox.embed_in.weight", (vocab, d)),
        "ln_scale": ("gpt_neox.final_layer_norm.weight", (d,)),
        "ln_bias": ("gpt_neox.final_layer_norm.bias", (d,)),
    }
    if not config.tied:
        tensors["unembed"] = ("embed_out.weight", (vocab, d))
    return tensors


def block_tensors(config: NeoXConfig) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Our name -> (the file's name below its layer, shape), for one block."""
    d, d_mlp = config.d_model, config.d_mlp
    tensors = {
        "ln1_scale": ("input_layernorm.weight", (d,)),
        "ln1_bias": ("input_layernorm.bias", (d,)),
        "w_qkv": ("attention.query_key_value.weight", (3 * d, d)),
        "w_out": ("attention.dense.weight", (d, d)),
        "ln2_scale": ("post_attention_layernorm.weight", (d,)),
        "ln2_bias": ("post_attention_layernorm.bias", (d,)),
        "w_up": ("mlp.dense_h_to_4h.weight", (d_mlp, d)),
        "b_up": ("mlp.dense_h_to_4h.bias", (d_mlp,)),
        "w_down": ("mlp.dense_4h_to_h.weight", (d, d_mlp)),
        "b_down": ("mlp.dense_4h_to_h.bias", (d,)),
    }
    if config.attention_bias:
        tensors["b_qkv"] = ("attention.query_key_value.bias", (3 * d,))
        tensors["b_out"] = ("attention.dense.bias", (d,))
    return tensors


class _Tensors:
    """The tensors of all weight files by name, read one at a time."""

    def __init__(self, files: ModelFiles):
        self._model = files.name
        self._file_of = {}
        for path in weight_files(files):
            try:
                file = safe_open(path, framework="numpy")
            except (SafetensorError, OSError) as error:
                raise UserError(f"{path} cannot be read: {one_line(error)}") from None
            self._file_of |= {name: file for name in file.keys()}

    def check(self, expected: Mapping[str, tuple[int, ...]], *, tied: bool) -> None:
        """Refuses weights that are not those of the config, naming the first."""
        for name, shape in expected.items():
            if name not in self._file_of:
                raise self._mismatch(f"the tensor {name} is missing")
            found = tuple(self._file_of[name].get_slice(name).get_shape())
            if found != shape:
                raise self._mismatch(f"the tensor {name} is {found}, not {shape}")
        ignored = {"embed_out.weight"} if tied else set()
        for name in sorted(self._file_of.keys() - expected.keys() - ignored):
            if not BUFFER.fullmatch(name):
                raise self._mismatch(f"the tensor {name} is not GPT-NeoX's")

    def read(self, name: str) -> np.ndarray:
        """One tensor in float32."""
        return self._file_of[name].get_tensor(name).astype(np.float32)

    def _mismatch(self, what: str) -> UserError:
        return UserError(
            f"the weights of --model={self._model} do not fit its config.json: {what}; "
            "restore the original files, or use --backend=transformers"
        )
