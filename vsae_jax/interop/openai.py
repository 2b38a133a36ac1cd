"""OpenAI's sparse_autoencoder: one `.pt` file, a state dict with strings in it.

    encoder.weight [d_sae, d_in], latent_bias, decoder.weight [d_in, d_sae], pre_bias
    activation(encoder (x - pre_bias) + latent_bias);  decoder f + pre_bias

Their TopK implies a LayerNorm of every row, which ours never has. So a TopK of ours is
written with `"input_norm": "none"` in vsae_jax_export.json; without that note a TopK is
read with the LayerNorm. Their own code always normalises a TopK: set
`normalize = False` on their Autoencoder.
"""

from pathlib import Path
from typing import Any

import numpy as np

from vsae_jax.interop import sidecar
from vsae_jax.interop.canonical import (
    Autoencoder,
    check_k,
    folded,
    foreign,
    refuse_thresholds,
    shown,
    subtracting,
)
from vsae_jax.interop.pt import read_pt
from vsae_jax.interop.pt_write import write_pt
from vsae_jax.interop.tensors import our_arrays, source_dtype
from vsae_jax.system.errors import UserError

NAME = "openai"
# The rule that its files say, where it is not the autoencoder's own.
SAYS = {"abstopk": "relu_topk"}
WEIGHTS = "autoencoder.pt"
_NAMES = {"w_enc": "encoder.weight", "b_enc": "latent_bias"}
_NAMES |= {"w_dec": "decoder.weight", "b_dec": "pre_bias"}
_RULES = {"ReLU": "relu", "Identity": "none"}
_TOPK_RULES = {"ReLU": "relu_topk", "Identity": "topk"}
_STATISTICS = (
    "stats_last_nonzero",
    "latents_activation_frequency",
    "latents_mean_square",
)


def weights(folder: Path) -> Path | None:
    """The one `.pt` file of a folder without a config."""
    if (folder / "config.json").is_file() or (folder / "cfg.json").is_file():
        return None
    found = sorted(folder.glob("*.pt"))
    return found[0] if len(found) == 1 else None


def read(folder: Path) -> Autoencoder:
    """The autoencoder of a folder with one of OpenAI's files."""
    path = weights(folder)
    value = read_pt(path) if path else None
    if path is None or not isinstance(value, dict):
        raise UserError(f"{folder} has no .pt file that holds a state dict")
    activation = value.pop("activation", "ReLU")
    settings = value.pop("activation_state_dict", {})
    # Their state_dict holds a TopK's settings twice.
    twins = {n: value.pop(f"activation.{n}", None) for n in ("k", "postact_fn")}
    stated = settings if isinstance(settings, dict) else {}
    if any(twins[n] not in (None, stated.get(n)) for n in twins):
        raise UserError(f"{path}: activation.k or postact_fn contradicts its state")
    arrays = {n: a for n, a in value.items() if n not in _STATISTICS}
    if not all(isinstance(a, np.ndarray) for a in arrays.values()):
        raise UserError(f"{path} holds more than tensors and an activation")
    params = our_arrays(arrays, _NAMES, where=path)
    rule, k = _rule(activation, settings, d_sae=len(params["b_enc"]), where=path)
    return foreign(
        params,
        rule=rule,
        k=k,
        layer_norm=k is not None and sidecar.layer_norm(folder),
        notes=("the statistics of OpenAI's latents were not carried over",),
        source={"format": NAME, "name": path.stem, "dtype": source_dtype(arrays)},
    )


def _rule(
    activation: Any, settings: Any, *, d_sae: int, where: Path
) -> tuple[str, int | None]:
    """The selection rule and k of their `activation` and its state."""
    if activation in ("ReLU", "Identity"):
        return _RULES[activation], None
    if activation != "TopK" or not isinstance(settings, dict):
        raise UserError(
            f"{where}: activation {shown(activation)} is not read; expected TopK with "
            "its state, ReLU or Identity"
        )
    after = settings.get("postact_fn")
    if not isinstance(after, str) or after not in _TOPK_RULES:
        raise UserError(
            f"{where}: postact_fn {shown(after)} is not read; expected ReLU or Identity"
        )
    return _TOPK_RULES[after], check_k(settings.get("k"), d_sae=d_sae, where=where)


def rewritten(ae: Autoencoder) -> Autoencoder:
    """What `write` writes: pre_bias subtracted, latents in the units of x."""
    refuse_thresholds(ae, NAME)
    if ae.layer_norm and ae.k is None:
        raise UserError("openai knows the per-row LayerNorm only of a TopK")
    return folded(subtracting(ae), units="raw")


def write(ae: Autoencoder, folder: Path) -> Path:
    """The file of a rewritten autoencoder."""
    p, m = ae.params, ae.config.d_sae
    after = "Identity" if ae.rule in ("topk", "none") else "ReLU"
    state: dict[str, Any] = {
        "pre_bias": p["b_dec"],
        "latent_bias": p["b_enc"],
        "stats_last_nonzero": np.zeros(m, np.int64),
        "latents_activation_frequency": np.ones(m, np.float32),
        "latents_mean_square": np.zeros(m, np.float32),
        "encoder.weight": np.ascontiguousarray(p["w_enc"].T),
        "decoder.weight": np.ascontiguousarray(p["w_dec"].T),
        "activation": after if ae.k is None else "TopK",
        "activation_state_dict": {},
    }
    if ae.k is not None:
        state["activation_state_dict"] = {"k": ae.k, "postact_fn": after}
    write_pt(folder / WEIGHTS, state)
    return folder / WEIGHTS
