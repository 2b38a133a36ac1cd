"""A trained autoencoder with how it reads a language model: arrays in, arrays out."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, cached_property, wraps
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float

from vsae_jax.autoencoder import sae
from vsae_jax.autoencoder.layer_norm import normalise_rows
from vsae_jax.autoencoder.sae import Variables
from vsae_jax.autoencoder.sparsity import compiler_options
from vsae_jax.config import Hook, SAEConfig


def jit_encode(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """`jax.jit(function, **options)` for a function that encodes, compiled with the
    options that selecting latents needs. Inside another jit it is `function` itself."""

    @cache
    def compiled() -> Callable[..., Any]:
        # At the first call, since the options depend on the backend, which is not known
        # yet when the module is imported.
        return jax.jit(function, compiler_options=compiler_options(), **options)

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        leaves = jax.tree.leaves((args, kwargs))
        traced = any(isinstance(leaf, Tracer) for leaf in leaves)
        return (function if traced else compiled())(*args, **kwargs)

    return call


def _static(default: Any) -> Any:
    return field(default=default, metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False, repr=False)
class Reader:
    """A trained autoencoder that reads a language model. It is a pytree: `jax.jit`
    traces its arrays, all else is static.

    variables: `params` and `norm`, as `sae.encode` takes them.
    hook: where in the language model it reads; None where that is not known.
    center: each row's mean over d_model is subtracted from the language model's rows.
    layer_norm: each row is then normalised (OpenAI); `decode` needs the rows again.
    has_bos: contexts start with BOS.
    dropped_positions: leading positions of a context that it was not trained on.
    """

    variables: Variables
    config: SAEConfig = field(metadata={"static": True})
    hook: Hook | None = _static(None)
    center: bool = _static(False)
    layer_norm: bool = _static(False)
    has_bos: bool = _static(True)
    dropped_positions: int = _static(0)

    @property
    def place(self) -> Hook:
        """Where in the language model it reads; raises where that is not known."""
        if self.hook is None:
            raise ValueError("it is not known which layer this autoencoder reads")
        return self.hook

    @property
    def layer(self) -> int:
        """The block of its hook."""
        return self.place.layer

    @cached_property
    def directions(self) -> Float[np.ndarray, "d_sae d_model"]:
        """What one unit of each latent adds to x (without a LayerNorm)."""
        w_dec = np.asarray(self.variables["params"]["w_dec"])
        return w_dec / float(self.variables["norm"]["scale"])

    def rows(
        self, residual: Float[Array, "batch time d_model"]
    ) -> Float[Array, "rows d_model"]:
        """The rows x that it was trained on, `batch * time` of them."""
        x = residual.reshape(-1, residual.shape[-1])
        return x - jnp.mean(x, axis=-1, keepdims=True) if self.center else x

    def encode(
        self, x: Float[Array | np.ndarray, "... d_model"]
    ) -> Float[Array, "... d_sae"]:
        """Latents of raw activations, at the mean: no noise."""
        return _encode(self, _floats(x, self.config.d_model, "d_model"))

    def decode(
        self,
        f: Float[Array | np.ndarray, "... d_sae"],
        *,
        rows: Float[Array | np.ndarray, "... d_model"] | None = None,
    ) -> Float[Array, "... d_model"]:
        """Raw activations from latents; `rows`: what was encoded, for a LayerNorm."""
        f = _floats(f, self.config.d_sae, "d_sae")
        if not self.layer_norm:
            return _decode(self, f, None)
        if rows is None:
            raise ValueError(
                "this autoencoder normalises each row: decode(f, rows=x) needs x"
            )
        return _decode(self, f, _floats(rows, self.config.d_model, "d_model"))

    def pre_activations(
        self, x: Float[Array | np.ndarray, "rows d_model"]
    ) -> Float[Array, "rows d_sae"]:
        """mu of every latent, before a relu."""
        config = dataclasses.replace(self.config, relu=False)
        return sae.pre_activations(self.variables, self._normalised(x), config=config)

    def row_scale(
        self, x: Float[Array | np.ndarray, "rows d_model"]
    ) -> Float[Array, "rows 1"]:
        """The factor on a latent's direction in each row: the standard deviation that
        a LayerNorm divided by, or else 1."""
        if not self.layer_norm:
            return jnp.ones((len(x), 1))
        return normalise_rows(jnp.asarray(x, jnp.float32))[2]

    def _normalised(self, x: Any) -> Array:
        return normalise_rows(x.astype(jnp.float32))[0] if self.layer_norm else x

    def __repr__(self) -> str:
        c = self.config
        kept = f", k {c.k}" if c.has_k else ""
        where = "" if self.hook is None else f", {self.hook.name}"
        return f"Reader({c.d_model} -> {c.d_sae} latents{kept}{where})"


@jit_encode
def _encode(reader: Reader, x: Float[Array, "... d_model"]) -> Array:
    rows = reader._normalised(x.reshape(-1, x.shape[-1]))
    f = sae.encode(reader.variables, rows, config=reader.config)
    return f.reshape(*x.shape[:-1], reader.config.d_sae)


@jax.jit
def _decode(
    reader: Reader,
    f: Float[Array, "... d_sae"],
    x: Float[Array, "... d_model"] | None,
) -> Array:
    rows = f.reshape(-1, f.shape[-1])
    x_hat = sae.decode(reader.variables, rows, config=reader.config)
    x_hat = x_hat.reshape(*f.shape[:-1], reader.config.d_model)
    if x is None:
        return x_hat
    _, mean, std = normalise_rows(x.astype(jnp.float32))
    return x_hat * std + mean


def _floats(array: Any, width: int, name: str) -> Array:
    """The array, of floats `[..., width]`; refuses what would silently be read wrongly,
    such as the raw bits in a bfloat16 shard. A NumPy array is copied: JAX might read it
    only after the caller has changed it."""
    if type(array).__module__.partition(".")[0] == "torch":
        raise ValueError(
            "this is a torch tensor; give a NumPy or JAX array: "
            "x.detach().float().cpu().numpy()"
        )
    array = array if isinstance(array, jax.Array) else np.asarray(array)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise ValueError(
            f"the array is of {array.dtype}, expected floats; shards of activations "
            "hold raw bfloat16 bits, which vsae_jax.open_activations(folder)"
            ".rows(start, stop) reads"
        )
    if array.ndim == 0 or array.shape[-1] != width:
        raise ValueError(
            f"the array has shape {list(array.shape)}, expected {name}={width} as its "
            "last axis"
        )
    return array if isinstance(array, jax.Array) else jnp.array(array)
