"""The autoencoder: thin flax.linen modules around four to six arrays.

    x_n     = scale * (x - mean)
    mu      = (x_n - b_dec) @ w_enc + b_enc         b_dec where subtract_b_dec
    z       = mu + noise_std * s * eps              training only
    f       = top_k(z), or z
    x_hat_n = f @ w_dec + b_dec;   x_hat = x_hat_n / scale + mean

Variables are a dict: `params` (w_enc [d_model, d_sae], b_enc [d_sae],
w_dec [d_sae, d_model], b_dec [d_model], and w_var, b_var of a learned variance) and
`norm` (scale [], mean [d_model]), which is saved with them and never trained.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from vsae_jax.autoencoder import noise
from vsae_jax.autoencoder.matmul import affine, plain_affine
from vsae_jax.autoencoder.sparsity import keep_top_k
from vsae_jax.config import SAEConfig

Variables = Mapping[str, Mapping[str, Array]]


class Forward(NamedTuple):
    """One pass over normalised rows. Without a learned variance `log_var` is None."""

    mu: Float[Array, "batch d_sae"]
    log_var: Float[Array, "batch d_sae"] | None
    f: Float[Array, "batch d_sae"]
    selected: Bool[Array, "batch d_sae"]
    x_hat_n: Float[Array, "batch d_model"]


class SAE(nn.Module):
    """A sparse autoencoder, variational or not; paper 2.1 and 2.2.

    `encode` and `decode` take and give raw activations; `forward` is the training
    pass on normalised ones.
    """

    config: SAEConfig

    def setup(self):
        c = self.config
        shapes = {"b_enc": (c.d_sae,), "b_dec": (c.d_model,)}
        self.w_dec = self.param("w_dec", _unit_rows, (c.d_sae, c.d_model))
        self.w_enc = self.param("w_enc", lambda _: self.w_dec.T)
        self.b_enc = self.param("b_enc", nn.initializers.zeros, shapes["b_enc"])
        self.b_dec = self.param("b_dec", nn.initializers.zeros, shapes["b_dec"])
        if c.variance == "learned":
            w_shape = (c.d_model, c.d_sae)
            self.w_var = self.param("w_var", nn.initializers.zeros, w_shape)
            self.b_var = self.param("b_var", nn.initializers.zeros, shapes["b_enc"])
        self.scale = self.variable("norm", "scale", jnp.ones, ())
        self.mean = self.variable("norm", "mean", jnp.zeros, shapes["b_dec"])

    def normalise(self, x: Float[Array, "batch d_model"]) -> Float[Array, "batch d"]:
        """x_n = scale * (x - mean), in float32."""
        return self.scale.value * (x.astype(jnp.float32) - self.mean.value[None, :])

    def posterior(self, x_n: Float[Array, "batch d_model"]) -> tuple[Array, Any]:
        """mu, after the optional relu, and log sigma^2 or None: `[batch, d_sae]`."""
        c = self.config
        if c.subtract_b_dec:
            b_dec = self.b_dec if self._plain else jax.lax.stop_gradient(self.b_dec)
            x_n = x_n - b_dec[None, :]
        mu = self._affine(x_n, self.w_enc, self._bias("b_enc", "w_enc"))
        mu = jax.nn.relu(mu) if c.relu else mu
        if c.variance == "fixed":
            return mu, None
        return mu, self._affine(x_n, self.w_var, self._bias("b_var", "w_var"))

    @property
    def _plain(self) -> bool:
        """`--top_k=lax`: all by autodiff, to which the tests hold the faster way."""
        return self.config.top_k == "lax"

    def _affine(self, x: Array, w: Array, b: Array) -> Array:
        return (plain_affine if self._plain else affine)(x, w, b, self.config.dtype)

    def _bias(self, bias: str, weight: str) -> Float[Array, " d_sae"]:
        """The bias; of a subtracted b_dec it carries the gradient."""
        b = getattr(self, bias)
        if self._plain or not self.config.subtract_b_dec:
            return b
        return _carry(b, self.b_dec, jax.lax.stop_gradient(getattr(self, weight)))

    def forward(
        self,
        x_n: Float[Array, "batch d_model"],
        *,
        k: int | Int[Array, ""],
        noise_std: float | Float[Array, ""] = 0.0,
        key: Key[Array, ""] | None = None,
        first_row: int | Int[Array, ""] = 0,
    ) -> Forward:
        """Posterior, sample (with a key, which is consumed), selection, x_hat. Where
        x_n is a part of a batch, `first_row` is its place, for its share of the noise.
        """
        mu, log_var = self.posterior(x_n)
        z = mu if key is None else mu + noise_std * _noise(key, mu, log_var, first_row)
        f, selected = self.sparsify(z, k=k)
        return Forward(mu, log_var, f, selected, self.reconstruct(f))

    def sparsify(self, z: Float[Array, "batch d_sae"], *, k: int | Int[Array, ""]):
        """f and the mask of the selected latents, each `[batch, d_sae]`."""
        c = self.config
        if c.sparsity == "none":
            return z, jnp.ones(z.shape, bool)
        return keep_top_k(z, k, k_max=c.k, selection=c.selection, method=c.top_k)

    def reconstruct(self, f: Float[Array, "batch d_sae"]) -> Float[Array, "batch d"]:
        """x_hat_n = f @ w_dec + b_dec."""
        return self._affine(f, self.w_dec, self.b_dec)

    def encode(self, x: Float[Array, "batch d_model"]) -> Float[Array, "batch d_sae"]:
        """Latents of raw activations, at the mean: no noise (PAPER_VS_CODE 6.1)."""
        return self.sparsify(self.pre_activations(x), k=self.config.k)[0]

    def pre_activations(self, x: Float[Array, "batch d_model"]) -> Float[Array, "b d"]:
        """What `encode` selects from: mu `[batch, d_sae]`, after the optional relu."""
        return self.posterior(self.normalise(x))[0]

    def decode(self, f: Float[Array, "batch d_sae"]) -> Float[Array, "batch d_model"]:
        """Raw activations from latents: x_hat = x_hat_n / scale + mean."""
        return self.reconstruct(f) / self.scale.value + self.mean.value[None, :]

    def __call__(self, x: Float[Array, "batch d_model"]) -> Float[Array, "batch d"]:
        """decode(encode(x))."""
        return self.decode(self.encode(x))


def encode(
    variables: Variables, x: Float[Array, "batch d_model"], *, config: SAEConfig
) -> Float[Array, "batch d_sae"]:
    """`SAE.encode` as a pure function."""
    return cast(Array, SAE(config).apply(variables, x, method="encode"))


def decode(
    variables: Variables, f: Float[Array, "batch d_sae"], *, config: SAEConfig
) -> Float[Array, "batch d_model"]:
    """`SAE.decode` as a pure function."""
    return cast(Array, SAE(config).apply(variables, f, method="decode"))


def pre_activations(
    variables: Variables, x: Float[Array, "batch d_model"], *, config: SAEConfig
) -> Float[Array, "batch d_sae"]:
    """`SAE.pre_activations` as a pure function."""
    return cast(Array, SAE(config).apply(variables, x, method="pre_activations"))


def normalise(
    variables: Variables, x: Float[Array, "batch d_model"], *, config: SAEConfig
) -> Float[Array, "batch d_model"]:
    """`SAE.normalise` as a pure function."""
    return cast(Array, SAE(config).apply(variables, x, method="normalise"))


def forward(
    params: Mapping[str, Array],
    x_n: Float[Array, "batch d_model"],
    *,
    config: SAEConfig,
    k: int | Int[Array, ""],
    noise_std: float | Float[Array, ""] = 0.0,
    key: Key[Array, ""] | None = None,
    first_row: int | Int[Array, ""] = 0,
) -> Forward:
    """`SAE.forward` as a pure function of the parameters: x_n is normalised."""
    norm = {"scale": jnp.ones(()), "mean": jnp.zeros(config.d_model)}
    options = {"k": k, "noise_std": noise_std, "key": key, "first_row": first_row}
    variables = {"params": params, "norm": norm}
    out = SAE(config).apply(variables, x_n, **options, method="forward")
    return cast(Forward, out)


def init(
    key: Key[Array, ""],
    config: SAEConfig,
    *,
    scale: float = 1.0,
    mean: Float[Array | np.ndarray, " d_model"] | None = None,
    b_dec: Float[Array, " d_model"] | None = None,
    decoder_init_norm: float = 1.0,
) -> dict[str, dict[str, Array]]:
    """Variables at the start: decoder rows uniform on the sphere of radius
    `decoder_init_norm`, the encoder their transpose, biases 0 unless `b_dec` is given
    (in normalised units). The key is consumed."""
    # The cheapest method: all parameters are made in `setup`.
    row = jnp.zeros((1, config.d_model))
    variables = SAE(config).init(key, row, method="normalise")
    params = cast(dict[str, Array], dict(variables["params"]))
    params["w_dec"] = params["w_dec"] * decoder_init_norm
    params["w_enc"] = params["w_enc"] * decoder_init_norm
    if b_dec is not None:
        params["b_dec"] = jnp.array(b_dec, jnp.float32)
    mean = jnp.zeros(config.d_model) if mean is None else jnp.asarray(mean)
    norm = {"scale": jnp.float32(scale), "mean": mean.astype(jnp.float32)}
    return {"params": params, "norm": norm}


def fold(
    variables: Variables, config: SAEConfig
) -> tuple[dict[str, dict[str, Array]], SAEConfig]:
    """The same autoencoder with scale 1 and mean 0: latents and x_hat are unchanged.

    SAELens' convention: w_enc *= s, w_dec /= s, b_dec = b_dec / s + mean, and where
    b_dec is not subtracted from the input b_enc -= s * mean @ w_enc. The decoder's
    rows then have norm 1 / s, so the folded config says `free`.
    """
    params, norm = variables["params"], variables["norm"]
    s, mean = norm["scale"], norm["mean"]
    folded = dict(params)
    folded["w_enc"] = params["w_enc"] * s
    folded["w_dec"] = params["w_dec"] / s
    folded["b_dec"] = params["b_dec"] / s + mean
    if "w_var" in params:
        folded["w_var"] = params["w_var"] * s
    if not config.subtract_b_dec:
        folded["b_enc"] = params["b_enc"] - mean @ folded["w_enc"]
        if "w_var" in params:
            folded["b_var"] = params["b_var"] - mean @ folded["w_var"]
    identity = {"scale": jnp.float32(1.0), "mean": jnp.zeros_like(mean)}
    config = dataclasses.replace(config, decoder_norm="free")
    return {"params": folded, "norm": identity}, config


def geometric_median(
    x: Float[Array, "batch d_model"], *, steps: int = 100
) -> Float[Array, " d_model"]:
    """The point with the least summed distance to the rows (Weiszfeld's iteration)."""

    def closer(_, point):
        distance = jnp.linalg.norm(x - point[None, :], axis=1)
        weight = 1.0 / jnp.maximum(distance, 1e-6)
        return weight @ x / jnp.sum(weight)

    return jax.lax.fori_loop(0, steps, closer, jnp.mean(x, axis=0))


@jax.custom_vjp
def _carry(
    b: Float[Array, " d_sae"],
    b_dec: Float[Array, " d_model"],
    w: Float[Array, "d_model d_sae"],
) -> Float[Array, " d_sae"]:
    """b, whose gradient g gives b_dec the gradient -w g: that of (x - b_dec) w + b,
    through one vector rather than through every row."""
    del b_dec, w
    return b


_carry.defvjp(
    lambda b, b_dec, w: (b, w),
    lambda w, g: (g, -(w @ g), jnp.zeros_like(w)),
)


def _noise(
    key: Key[Array, ""],
    mu: Array,
    log_var: Array | None,
    first_row: int | Int[Array, ""],
) -> Array:
    """s * eps with eps ~ N(0, I) (paper 2.2.1); s = 1 without a learned variance."""
    eps = noise.normal(key, (mu.shape[0], mu.shape[1]), first_row=first_row)
    return eps if log_var is None else jnp.exp(0.5 * log_var) * eps


def _unit_rows(key: Key[Array, ""], shape: tuple[int, int]) -> Array:
    w = jax.random.normal(key, shape, jnp.float32)
    return w / jnp.linalg.norm(w, axis=1, keepdims=True)
