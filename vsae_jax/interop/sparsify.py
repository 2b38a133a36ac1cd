"""EleutherAI's sparsify: `cfg.json` and `sae.safetensors`, a folder a hookpoint.

    encoder.weight [d_sae, d_in], encoder.bias, W_dec [d_sae, d_in], b_dec
    the k largest of relu((x - b_dec) @ encoder.weight.T + encoder.bias)

It always subtracts b_dec; `layers.3` is the output of block 3. Latents get the units of
x, so that unit decoder rows stay so.
"""

import re
from pathlib import Path
from typing import Any

from safetensors.numpy import save

from vsae_jax import runs
from vsae_jax.interop import provenance
from vsae_jax.interop.canonical import (
    Autoencoder,
    check_k,
    folded,
    foreign,
    refuse_layer_norm,
    shown,
    subtracting,
)
from vsae_jax.interop.tensors import (
    as_float32,
    check_keys,
    check_layout,
    read_json,
    read_safetensors,
    size_of,
    source_dtype,
)
from vsae_jax.system.errors import UserError
from vsae_jax.system.files import replace_file

NAME = "sparsify"
# The rule that its files say, where it is not the autoencoder's own.
SAYS = {"topk": "relu_topk", "abstopk": "relu_topk", "none": "relu"}
CONFIG, WEIGHTS = "cfg.json", "sae.safetensors"
_HOOKPOINT = re.compile(r"layers\.(\d{1,4})")
_KEYS = (
    "d_in k num_latents expansion_factor activation normalize_decoder multi_topk "
    "skip_connection transcode signed"
)
# What else may stand in a config and would change what is computed.
_REFUSED = {"skip_connection": False, "transcode": False, "signed": False}


def weights(folder: Path) -> Path | None:
    """The file of the weights, if this is such a folder."""
    both = (folder / CONFIG).is_file() and (folder / WEIGHTS).is_file()
    return folder / WEIGHTS if both else None


def read(folder: Path) -> Autoencoder:
    """The autoencoder of a folder that sparsify's `save_to_disk` wrote."""
    where, c = folder / CONFIG, read_json(folder / CONFIG)
    check_keys(c, _KEYS, where=where)
    for name, value in _REFUSED.items():
        if c.get(name, value) is not value:
            raise UserError(f"{where}: {name}={shown(c[name])} is not read")
    if c.get("activation", "topk") != "topk":
        raise UserError(
            f"{where}: activation {shown(c['activation'])} is not read; expected topk"
        )
    arrays = read_safetensors(folder / WEIGHTS)
    d = size_of(arrays, "b_dec", where=folder / WEIGHTS)
    m = size_of(arrays, "encoder.bias", where=folder / WEIGHTS)
    if c.get("d_in") != d or c.get("num_latents", 0) not in (0, m):
        raise UserError(
            f"{where} says d_in={shown(c.get('d_in'))}, "
            f"num_latents={shown(c.get('num_latents'))}, but {WEIGHTS} has {d}, {m}"
        )
    layout = {"encoder.weight": (m, d), "encoder.bias": (m,), "W_dec": (m, d)}
    check_layout(arrays, layout | {"b_dec": (d,)}, where=folder / WEIGHTS)
    floats = as_float32(arrays, where=folder / WEIGHTS)
    hookpoint = _HOOKPOINT.fullmatch(folder.resolve().name)
    return foreign(
        {
            "w_enc": floats["encoder.weight"].T.copy(),
            "b_enc": floats["encoder.bias"],
            "w_dec": floats["W_dec"],
            "b_dec": floats["b_dec"],
        },
        rule="relu_topk",
        k=check_k(c.get("k"), d_sae=m, where=where),
        data=provenance.data(layer=int(hookpoint[1]) if hookpoint else None),
        source={"format": NAME, "name": folder.name, "dtype": source_dtype(arrays)},
    )


def rewritten(ae: Autoencoder) -> Autoencoder:
    """What `write` writes: b_dec subtracted, latents in the units of x."""
    refuse_layer_norm(ae, NAME)
    if ae.k is None:
        raise UserError(f"sparsify has no {ae.rule} autoencoder, only TopK")
    return folded(subtracting(ae), units="raw")


def write(ae: Autoencoder, folder: Path) -> Path:
    """The two files of a rewritten autoencoder; returns that of the weights."""
    p, d, m = ae.params, ae.config.d_model, ae.config.d_sae
    arrays: dict[str, Any] = {
        "encoder.weight": p["w_enc"].T.copy(),
        "encoder.bias": p["b_enc"],
        "W_dec": p["w_dec"],
        "b_dec": p["b_dec"],
    }
    config = {
        "activation": "topk",
        "expansion_factor": max(m // d, 1),
        "normalize_decoder": ae.config.decoder_norm == "unit",
        "num_latents": m,
        "k": ae.k,
        "multi_topk": False,
        "skip_connection": False,
        "transcode": False,
        "d_in": d,
    }
    replace_file(folder / WEIGHTS, save(arrays))
    runs.write_json(folder / CONFIG, config)
    return folder / WEIGHTS
