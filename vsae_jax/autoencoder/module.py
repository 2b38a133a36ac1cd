"""The autoencoder as a flax.linen module: a shell around the functions of `sae`."""

from functools import partial
from typing import Any

import flax.linen as nn
from jaxtyping import Array, Float

from vsae_jax.autoencoder import sae
from vsae_jax.autoencoder.arrays import Latents, Rows
from vsae_jax.config import SAEConfig


class SAE(nn.Module):
    """A sparse autoencoder, variational or not (Baker and Li, 2.1 and 2.2).

    `encode`, `decode` and the call take and give raw activations `[batch, d_model]`;
    `forward` is the training pass on normalised ones. Only this file imports flax.
    """

    config: SAEConfig

    def setup(self) -> None:
        params: dict[str, Any] = {}
        for name, spec in sae.arrays(self.config).items():
            start = partial(spec.start, shape=spec.shape(self.config), made=params)
            params[name] = self.param(name, start)
        norm: dict[str, Any] = {}
        for name, spec in sae.buffers(self.config).items():
            start = partial(spec.start, None, spec.shape(self.config), norm)
            norm[name] = self.variable("norm", name, start).value
        self.held = {"params": params, "norm": norm}

    def encode(self, x: Rows) -> Latents:
        """Latents of raw activations, at the mean."""
        return sae.encode(self.held, x, config=self.config)

    def decode(self, f: Latents) -> Rows:
        """Raw activations from latents."""
        return sae.decode(self.held, f, config=self.config)

    def forward(self, x_n: Rows, numbers: sae.Numbers, **options: Any) -> sae.Forward:
        """`sae.forward` with this module's parameters."""
        params = self.held["params"]
        return sae.forward(params, x_n, numbers, config=self.config, **options)

    def __call__(self, x: Rows) -> Float[Array, "batch d"]:
        """decode(encode(x))."""
        return self.decode(self.encode(x))
