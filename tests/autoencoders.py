"""Small autoencoders of every rule and their round trips through a folder."""

import dataclasses
from pathlib import Path

import numpy as np

from vsae_jax import interop
from vsae_jax.config import SAEConfig
from vsae_jax.interop import sidecar
from vsae_jax.interop.canonical import THRESHOLDS, Autoencoder, with_rule

DATA = {
    "model": "EleutherAI/pythia-70m-deduped",
    "revision": "abc",
    "dataset": "roneneldan/TinyStories",
    "hook_name": "blocks.3.hook_resid_post",
    "layer": 3,
    "context_length": 128,
    "bos": "drop",
    "dropped_positions": 1,
    "center_residual": False,
    "manifest": "0" * 64,
    "held_out_contexts": [1, 2],
}


def make(
    *,
    rule: str = "relu_topk",
    d_model: int = 6,
    d_sae: int = 10,
    k: int = 3,
    subtract_b_dec: bool = True,
    scale: float = 1.0,
    centred: bool = False,
    head: bool = False,
    layer_norm: bool = False,
    seed: int = 0,
    data: dict | None = None,
) -> Autoencoder:
    """An autoencoder with random weights."""
    rng = np.random.default_rng(seed)
    shapes = {"w_enc": (d_model, d_sae), "b_enc": (d_sae,)}
    shapes |= {"w_dec": (d_sae, d_model), "b_dec": (d_model,)}
    head = head or rule == "vaease"
    shapes |= {"w_var": (d_model, d_sae), "b_var": (d_sae,)} if head else {}
    if rule in ("gated", "gated_linear"):
        shapes |= {"r_mag": (d_sae,), "b_mag": (d_sae,)}
    if rule in THRESHOLDS:
        shapes |= {THRESHOLDS[rule]: () if rule == "batch_topk" else (d_sae,)}
    params = {n: np.float32(rng.normal(size=shape)) for n, shape in shapes.items()}
    for name in THRESHOLDS.values() & params.keys():
        params[name] = np.abs(params[name])
    mean = np.float32(rng.normal(size=d_model)) * centred
    config = SAEConfig(
        d_model=d_model,
        d_sae=d_sae,
        k=k,
        sparsity="none" if rule == "vaease" else "topk",
        variance="learned" if head else "fixed",
        subtract_b_dec=subtract_b_dec,
    )
    ae = Autoencoder(
        config=config,
        params=params,
        scale=np.float32(scale),
        mean=np.float32(mean),
        layer_norm=layer_norm,
        data=DATA if data is None else data,
        source={"format": "vsae_jax", "name": "tiny"},
    )
    return with_rule(ae, rule)


def write(ae: Autoencoder, format: str, folder: Path) -> Path:
    """What `convert` writes, without its self-check and model card."""
    folder.mkdir(parents=True)
    module = interop.FORMATS[format]
    written = module.rewritten(ae)
    weights = module.write(written, folder)
    sidecar.write(written, folder, weights=weights, notes=[], check=None)
    return folder


def trip(ae: Autoencoder, format: str, folder: Path) -> Autoencoder:
    """There and back."""
    return interop.read(write(ae, format, folder))


def z_and_x_hat(ae: Autoencoder, x: np.ndarray, f: np.ndarray):
    """Pre-activations of x (of both paths, where a gate has one), and x_hat of f, both
    in float64 and in the units of the autoencoder that `ae` was rewritten from; log
    sigma^2, or zeros; the thresholds."""
    p = {name: array.astype(np.float64) for name, array in ae.params.items()}
    x_n = float(ae.scale) * (x - ae.mean)
    x_in = x_n - p["b_dec"] if ae.config.subtract_b_dec else x_n
    z = (x_in @ p["w_enc"] + p["b_enc"]) / ae.latent_scale
    if "r_mag" in p:
        magnitude = np.exp(p["r_mag"]) * (x_in @ p["w_enc"]) + p["b_mag"]
        z = np.hstack([z, magnitude / ae.latent_scale])
    x_hat_n = (f * ae.latent_scale) @ p["w_dec"] + p["b_dec"]
    log_var = np.zeros(1)
    if "w_var" in p:
        log_var = x_in @ p["w_var"] + p["b_var"] - 2 * np.log(ae.latent_scale)
    cut = p.get(THRESHOLDS.get(ae.rule, ""), np.zeros(1)) / ae.latent_scale
    return z, x_hat_n / float(ae.scale) + ae.mean, log_var, cut


def assert_same(a: Autoencoder, b: Autoencoder) -> None:
    """Bit for bit, conventions included."""
    assert a.params.keys() == b.params.keys()
    for name, array in a.params.items():
        assert b.params[name].dtype == np.float32
        np.testing.assert_array_equal(b.params[name], array, err_msg=name)
    np.testing.assert_array_equal(b.mean, a.mean)
    assert (b.scale, b.layer_norm) == (a.scale, a.layer_norm)
    assert (b.rule, b.k, b.data) == (a.rule, a.k, a.data)
    assert dataclasses.asdict(b.config) == dataclasses.asdict(a.config)
