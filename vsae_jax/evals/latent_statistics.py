"""Numbers of single latents: firing and weights (docs/saebench.md 1.5)."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

_ROWS = 1024
_DIGITS = 6

# The units of what is not a share, a count or a cosine.
UNITS = {
    "encoder_norm": "latent per unit of raw activation",
    "encoder_bias": "latent, of a raw activation of 0 but for b_dec where subtracted",
}

PerLatent = dict[str, Float[np.ndarray, " d_sae"]]


def per_latent(
    params: Mapping[str, Array],
    density: Float[np.ndarray, " d_sae"],
    *,
    fired: Float[np.ndarray, " d_sae"],
    contexts_fired: Float[np.ndarray, " d_sae"],
) -> PerLatent:
    """The numbers of each latent by name; NaN where a latent that never fires has none.

    Args:
      params: w_enc `[d_model, d_sae]`, b_enc, and w_dec `[d_sae, d_model]`, as they
        read and write raw activations (`sae.fold`).
      density: the share of tokens on which a latent is above 0.
      fired: the number of these tokens.
      contexts_fired: the number of contexts with one.
    """
    w_enc, w_dec = params["w_enc"].T, params["w_dec"]
    unit_enc, unit_dec = _unit(w_enc), _unit(w_dec)
    never = contexts_fired == 0
    return {
        "feature_density": density,
        "consistent_activation_heuristic": np.where(
            never, np.nan, fired / np.maximum(contexts_fired, 1)
        ),
        "encoder_bias": np.asarray(params["b_enc"]),
        "encoder_norm": np.linalg.norm(np.asarray(w_enc), axis=1),
        "encoder_decoder_cosine_sim": np.asarray(jnp.sum(unit_enc * unit_dec, axis=1)),
        "max_encoder_cosine_sim": nearest(unit_enc),
        "max_decoder_cosine_sim": nearest(unit_dec),
    }


def averages(latents: PerLatent) -> dict[str, float]:
    """SAEBench's shares of latents by density, and the means of the cosines."""
    density = latents["feature_density"]
    total = float(density.sum())
    shares = {}
    for name, limit in (("1", 0.01), ("10", 0.1)):
        above = density > limit
        shares[f"freq_over_{name}_percent"] = float(above.mean())
        share = float(density[above].sum()) / total if total else 0.0
        shares[f"normalized_freq_over_{name}_percent"] = share
    return shares | {
        f"average_max_{side}_cosine_sim": float(
            latents[f"max_{side}_cosine_sim"].mean()
        )
        for side in ("encoder", "decoder")
    }


def rounded(
    latents: PerLatent, *, digits: int = _DIGITS
) -> dict[str, list[float | None]]:
    """The numbers for JSON, with so many significant digits; None for NaN."""

    def short(value: Any) -> float | None:
        return float(f"{value:.{digits}g}") if np.isfinite(value) else None

    return {name: [short(v) for v in values] for name, values in latents.items()}


def nearest(unit: Float[Array, "latents d"]) -> Float[np.ndarray, " latents"]:
    """The largest (signed) cosine of each unit row with another row; 0 if there is no
    other. Computed in blocks of rows."""
    if len(unit) < 2:
        return np.zeros(len(unit), np.float32)
    blocks = [_nearest(unit, start) for start in range(0, len(unit), _ROWS)]
    return np.concatenate(blocks)[: len(unit)]


@partial(jax.jit, static_argnums=(1,))
def _nearest(unit: Float[Array, "latents d"], start: int) -> Float[Array, " block"]:
    cosine = unit[start : start + _ROWS] @ unit.T
    own = jnp.arange(len(cosine))
    return jnp.max(cosine.at[own, own + start].set(-2.0), axis=1)


def _unit(rows: Float[Array, "latents d"]) -> Float[Array, "latents d"]:
    return rows / jnp.maximum(jnp.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
