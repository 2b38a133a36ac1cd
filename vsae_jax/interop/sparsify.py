"""EleutherAI's sparsify: `cfg.json` and `sae.safetensors`, a folder a hookpoint.

    encoder.weight [d_sae, d_in], encoder.bias, W_dec [d_sae, d_in], b_dec
    the k largest of relu((x - b_dec) @ encoder.weight.T + encoder.bias)

It always subtracts b_dec; `layers.3` is the output of block 3. Latents get the units of
x, so that decoder rows of norm 1 keep it.
"""

import re
from pathlib import Path

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
    check_keys,
    file_beside,
    our_arrays,
    read_json,
    read_safetensors,
    source_dtype,
    their_arrays,
)
from vsae_jax.system.errors import UserError
from vsae_jax.system.files import replace_file

NAME = "sparsify"
# The rule that its files say, where it is not the autoencoder's own.
SAYS = {"topk": "relu_topk", "abstopk": "relu_topk", "none": "relu"}
CONFIG, WEIGHTS = "cfg.json", "sae.safetensors"
_NAMES = {"w_enc": "encoder.weight", "b_enc": "encoder.bias"}
_NAMES |= {"w_dec": "W_dec", "b_dec": "b_dec"}
_HOOKPOINT = re.compile(r"layers\.(\d{1,4})")
_KEYS = (
    "d_in k num_latents expansion_factor activation normalize_decoder multi_topk "
    "skip_connection transcode signed"
)
# Settings that would change what is computed, and their only supported value.
_REFUSED = {"skip_connection": False, "transcode": False, "signed": False}


weights = file_beside(CONFIG, WEIGHTS)


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
    params = our_arrays(arrays, _NAMES, where=folder / WEIGHTS)
    d, m = params["w_enc"].shape
    if c.get("d_in") != d or c.get("num_latents", 0) not in (0, m):
        raise UserError(
            f"{where} says d_in={shown(c.get('d_in'))}, "
            f"num_latents={shown(c.get('num_latents'))}, but {WEIGHTS} has {d}, {m}"
        )
    hookpoint = _HOOKPOINT.fullmatch(folder.resolve().name)
    return foreign(
        params,
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
    d, m = ae.config.d_model, ae.config.d_sae
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
    replace_file(folder / WEIGHTS, save(their_arrays(ae.params, _NAMES)))
    runs.write_json(folder / CONFIG, config)
    return folder / WEIGHTS
