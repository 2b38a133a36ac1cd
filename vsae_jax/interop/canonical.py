"""The canonical form: what every format is read into and written from.

    w_enc [d_model, d_sae], b_enc [d_sae], w_dec [d_sae, d_model], b_dec [d_model]
    (w_var, b_var of a variance head), scale [], mean [d_model]

    x_n = scale * (x - mean);  z = (x_n - b_dec where subtract_b_dec) @ w_enc + b_enc
    f = the selection rule's;  x_hat = (f @ w_dec + b_dec) / scale + mean

The functions here rewrite one such form as another with the same x_hat, in float64.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from vsae_jax.autoencoder import sae
from vsae_jax.autoencoder.sparsifiers import SPARSIFIERS
from vsae_jax.config import SAEConfig
from vsae_jax.system.errors import UserError

# relu_topk: the k largest of relu(z). topk: the k largest z, negative ones included.
# abstopk: the k largest |z|, with their sign. relu: relu(z). none: z. batch_topk:
# relu(z) above one threshold. jump_relu: relu(z) above a threshold of each latent.
# gated: relu(z) where the gate's path is above 0; gated_linear: z there. vaease: (1 -
# sigma) z where 1 - sigma is not small.
Rule = Literal[
    "relu_topk",
    "topk",
    "abstopk",
    "relu",
    "none",
    "batch_topk",
    "jump_relu",
    "gated",
    "gated_linear",
    "vaease",
]
_SWITCHES: dict[str, dict[str, Any]] = {
    "relu_topk": {"sparsity": "topk", "relu": True},
    "topk": {"sparsity": "topk", "relu": False, "selection": "value"},
    "abstopk": {"sparsity": "topk", "relu": False, "selection": "magnitude"},
    "relu": {"sparsity": "none", "relu": True},
    "none": {"sparsity": "none", "relu": False},
    "batch_topk": {"sparsity": "batch_topk", "relu": True},
    "jump_relu": {"sparsity": "jump_relu", "relu": False},
    "gated": {"sparsity": "none", "relu": True, "gate": "path"},
    "gated_linear": {"sparsity": "none", "relu": False, "gate": "path"},
    "vaease": {"sparsity": "none", "relu": False, "gate": "sigma"},
}
RULES = tuple(_SWITCHES)
# The rules that have thresholds, and the array that holds them.
THRESHOLDS = {n: s.THRESHOLD for n, s in SPARSIFIERS.items() if s.THRESHOLD}


@dataclass(frozen=True)
class Autoencoder:
    """An autoencoder and what is known of it; `params` are all of its arrays but scale
    and mean.

    layer_norm: each row is first brought to mean 0 and standard deviation 1, and
      x_hat back (OpenAI): x' = (x - m) / (std + 1e-5), with std unbiased.
    latent_scale: its latents are this many times those of its original.
    data, train: those of a run's config.json, as far as they are known.
    source: format, name, step and dtype of the files it comes from.
    notes: what a reader has to know and no other field says.
    """

    config: SAEConfig
    params: dict[str, np.ndarray]
    scale: np.float32
    mean: np.ndarray
    layer_norm: bool = False
    latent_scale: float = 1.0
    data: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] | None = None
    source: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def rule(self) -> Rule:
        """The selection rule of the config."""
        if self.config.gate == "sigma":
            return "vaease"
        if self.config.gate == "path":
            return "gated" if self.config.relu else "gated_linear"
        if self.config.sparsity == "none":
            return "relu" if self.config.relu else "none"
        if self.config.sparsity != "topk":
            return self.config.sparsity
        if self.config.relu:
            return "relu_topk"
        return "topk" if self.config.selection == "value" else "abstopk"

    @property
    def k(self) -> int | None:
        """Latents kept of each row; None where that is no fixed number."""
        return self.config.k if self.config.sparsity == "topk" else None

    @property
    def variables(self) -> dict[str, dict[str, Any]]:
        """The arrays, as `sae.encode` takes them."""
        held = {**self.params, "scale": self.scale, "mean": self.mean}
        kinds = {"params": sae.arrays(self.config), "norm": sae.buffers(self.config)}
        return {kind: {n: held[n] for n in names} for kind, names in kinds.items()}


def foreign(
    params: dict[str, np.ndarray],
    *,
    rule: str,
    k: int | None = None,
    subtract_b_dec: bool = True,
    prefixes: str = "none",
    **known: Any,
) -> Autoencoder:
    """An autoencoder from another library: no scale, no mean, decoder norms free."""
    d_model, d_sae = params["w_enc"].shape
    config = SAEConfig(
        d_model=d_model,
        d_sae=d_sae,
        k=min(64, d_sae) if k is None else k,
        noise=False,
        variance="learned" if "w_var" in params else "fixed",
        penalty="none",
        decoder_norm="free",
        subtract_b_dec=subtract_b_dec,
        prefixes=prefixes,
        **_SWITCHES[rule],
    )
    return Autoencoder(
        config=config,
        params=params,
        scale=np.float32(1),
        mean=np.zeros(d_model, np.float32),
        **known,
    )


def with_rule(ae: Autoencoder, rule: str) -> Autoencoder:
    """The same weights under another selection rule. One threshold for all latents
    and one for each are turned into each other, where the latter are equal."""
    if rule == ae.rule:
        return ae
    params = dict(ae.params)
    if ae.rule in THRESHOLDS and rule in THRESHOLDS:
        each = thresholds(ae)
        del params[THRESHOLDS[ae.rule]]
        one = not sae.every_array()[THRESHOLDS[rule]].axes
        if one and (each != each[0]).any():
            raise UserError(f"the latents' thresholds differ: this is no {rule}")
        params[THRESHOLDS[rule]] = each[0] if one else each
    config = dataclasses.replace(ae.config, **_SWITCHES[rule])
    return dataclasses.replace(ae, config=config, params=params)


def same_kind(rule: str, other: str) -> bool:
    """Whether autoencoders of both rules have the same kind of arrays: thresholds, the
    same gate, or neither."""
    gates = [_SWITCHES[name].get("gate") for name in (rule, other)]
    return gates[0] == gates[1] and (rule in THRESHOLDS) == (other in THRESHOLDS)


def thresholds(ae: Autoencoder) -> np.ndarray:
    """The threshold of each latent, `[d_sae]`, under a rule that has thresholds."""
    own = ae.params[THRESHOLDS[ae.rule]]
    return np.full(ae.config.d_sae, own, np.float32)


def subtracting(ae: Autoencoder) -> Autoencoder:
    """The same with b_dec subtracted from the input: b_enc += b_dec @ w_enc."""
    return ae if ae.config.subtract_b_dec else _moved_b_dec(ae, 1)


def not_subtracting(ae: Autoencoder) -> Autoencoder:
    """The same with b_dec not subtracted: b_enc -= b_dec @ w_enc."""
    return _moved_b_dec(ae, -1) if ae.config.subtract_b_dec else ae


def _moved_b_dec(ae: Autoencoder, sign: int) -> Autoencoder:
    b_dec = sign * ae.params["b_dec"].astype(np.float64)
    moved = sae.moved_input(ae.params, b_dec)
    params = ae.params | {name: _float32(bias) for name, bias in moved.items()}
    config = dataclasses.replace(ae.config, subtract_b_dec=sign > 0)
    return dataclasses.replace(ae, config=config, params=params)


def folded(ae: Autoencoder, *, units: Literal["scaled", "raw"]) -> Autoencoder:
    """The same with scale 1 and mean 0: `sae.fold`."""
    if ae.scale == 1 and not ae.mean.any():
        return ae
    variables, config = sae.fold(ae.variables, ae.config, units=units)
    arrays = variables["params"] | variables["norm"]
    return dataclasses.replace(
        ae,
        config=config,
        params={name: _float32(arrays[name]) for name in ae.params},
        scale=np.float32(1),
        mean=np.zeros_like(ae.mean),
        latent_scale=ae.latent_scale / (float(ae.scale) if units == "raw" else 1),
    )


def _float32(array: Any) -> np.ndarray:
    return np.array(array, np.float32, order="C")


def refuse_thresholds(ae: Autoencoder, name: str) -> None:
    """Refuses thresholds and gates, for a format that has neither."""
    refuse_gate_by_sigma(ae, name)
    if ae.rule in THRESHOLDS or ae.config.gate != "none":
        what = "thresholds" if ae.rule in THRESHOLDS else "gate"
        raise UserError(
            f"{name} cannot hold the {what} of a {ae.rule} autoencoder; write it "
            "with --to=saelens, dictionary_learning or vsae_jax"
        )


def refuse_gate_by_sigma(ae: Autoencoder, name: str) -> None:
    """Refuses a gate by sigma, which no format but ours has."""
    if ae.config.gate == "sigma":
        raise UserError(
            f"{name} cannot hold the gate of a {ae.rule} autoencoder, 1 - sigma of "
            "each row; write it with --to=vsae_jax"
        )


def refuse_layer_norm(ae: Autoencoder, name: str) -> None:
    """Refuses a per-row LayerNorm, for a format that has none."""
    if ae.layer_norm:
        raise UserError(
            f"{name} cannot hold the per-row LayerNorm of {ae.source.get('name')}; "
            "write it with --to=saelens, openai or vsae_jax"
        )


def shown(value: Any) -> str:
    """A value from a stranger as it is shown in a message; a container by its type."""
    scalar = value is None or isinstance(value, str | int | float)
    return repr(str(value)[:40]) if scalar else f"a {type(value).__name__}"


def check_k(k: Any, *, d_sae: int, where: Any) -> int:
    """k of a TopK, a whole number between 1 and d_sae."""
    if k is None:
        raise UserError(
            f"{where} says TopK but no k; expected the number of latents kept per row"
        )
    if type(k) is not int or not 1 <= k < 2**31:
        raise UserError(
            f"{where}: k is {shown(k)}, expected a whole number of at least 1"
        )
    if k > d_sae:
        raise UserError(f"{where}: k={k} must not exceed d_sae={d_sae}")
    return k
