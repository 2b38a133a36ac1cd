"""The frequencies of rotary positions and their scalings, from config.json."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float

from vsae_jax.system.errors import UserError

Settings = Mapping[str, Any]


def frequencies(
    settings: Settings, *, base: float, ndims: int, max_positions: int
) -> tuple[Float[np.ndarray, " half"], float]:
    """The radians by which a position turns each pair of dimensions, and the scale of
    cosine and sine.

    settings: `rope_parameters` of config.json, or `rope_scaling` of an older one.
    """
    kind = settings.get("rope_type", settings.get("type", "default"))
    if kind not in _SCALINGS:
        raise UserError(
            f"--backend=jax does not run the rotary scaling {kind!r}, only "
            f"{', '.join(_SCALINGS)}; use --backend=transformers"
        )
    base = float(settings.get("rope_theta") or base)
    plain = np.float32(base) ** -(np.arange(0, ndims, 2, dtype=np.float32) / ndims)
    original = settings.get("original_max_position_embeddings") or max_positions
    try:
        return _SCALINGS[kind](settings, plain, base, original)
    except KeyError as error:
        raise UserError(
            f"config.json: the rotary scaling {kind!r} lacks {error.args[0]}; restore "
            "the original"
        ) from None


def is_dynamic(settings: Settings) -> bool:
    """Whether the frequencies change with the context's length beyond the positions
    that the model was made for."""
    return settings.get("rope_type", settings.get("type")) == "dynamic"


def _as_they_are(settings, plain, base, original):
    return plain, 1.0


def _linear(settings, plain, base, original):
    return plain / np.float32(settings["factor"]), 1.0


def _llama3(settings, plain, base, original):
    """Slows long waves by `factor`, short ones not at all, those between partly."""
    low, high = settings["low_freq_factor"], settings["high_freq_factor"]
    turns = original * plain / (2 * math.pi)
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    return plain * ((1 - smooth) / settings["factor"] + smooth), 1.0


def _yarn(settings, plain, base, original):
    """Like llama3, with a ramp over dimensions and a scale that grows with `factor`."""
    factor, half = settings["factor"], len(plain)

    def dimension(turns: float) -> float:
        return half * math.log(original / (turns * 2 * math.pi)) / math.log(base)

    low = dimension(settings.get("beta_fast") or 32)
    high = dimension(settings.get("beta_slow") or 1)
    if settings.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * half - 1)
    ramp = (np.arange(half) - low) / (high - low if high > low else 0.001)
    slowed = np.clip(ramp, 0, 1)
    scale = settings.get("attention_factor")
    if scale is None:
        above, below = settings.get("mscale"), settings.get("mscale_all_dim")
        if above and below:
            scale = _length(factor, above) / _length(factor, below)
        else:
            scale = _length(factor, 1)
    return plain * (slowed / factor + 1 - slowed), float(scale)


def _length(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1


_SCALINGS = {
    "default": _as_they_are,
    "linear": _linear,
    "dynamic": _as_they_are,
    "llama3": _llama3,
    "yarn": _yarn,
}
