"""Gemma Scope's files: what a plain computation says, and what is refused."""

import io
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from test_hostile import one_line
from tiny_runs import call

import vsae_jax
from vsae_jax import interop
from vsae_jax.interop.npz import read_npz
from vsae_jax.system.errors import UserError

D, M = 6, 10
NPZ = "params.npz"


def arrays(seed: int = 0) -> dict[str, np.ndarray]:
    """As Gemma Scope stores them."""
    rng = np.random.default_rng(seed)
    shapes = {"W_dec": (M, D), "W_enc": (D, M), "b_dec": (D,), "b_enc": (M,)}
    made = {n: np.float32(rng.normal(size=shape)) for n, shape in shapes.items()}
    return made | {"threshold": np.float32(rng.uniform(0.1, 1, M))}


def x_hat(p: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
    p = {name: array.astype(np.float64) for name, array in p.items()}
    z = x @ p["W_enc"] + p["b_enc"]
    return np.where(z > p["threshold"], np.maximum(z, 0), 0) @ p["W_dec"] + p["b_dec"]


def folder_of(tmp_path: Path, inside: str, **changed) -> Path:
    folder = tmp_path / inside
    folder.mkdir(parents=True)
    np.savez(folder / NPZ, **(arrays() | changed))
    return folder


GEMMA_2 = "gemma-scope-9b-it-res/layer_20/width_16k/average_l0_71"
GEMMA_3 = "models--google--gemma-scope-2-4b-pt/snapshots/a/resid_post/layer_9_width_1k"


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("order", ["C", "F"])
def test_x_hat_is_that_of_a_plain_computation(tmp_path, save, order):
    stored = {n: np.asarray(a, order=order) for n, a in arrays().items()}
    save(tmp_path / NPZ, **stored)
    x = np.random.default_rng(1).normal(size=(64, D)).astype("f4")
    sae = vsae_jax.load(tmp_path / NPZ)
    np.testing.assert_allclose(sae(x), x_hat(stored, x), rtol=1e-5, atol=1e-5)
    assert 0 < np.count_nonzero(sae.encode(x)) < 64 * M


@pytest.mark.parametrize(
    "inside, model, hook, layer",
    [
        (GEMMA_2, "google/gemma-2-9b-it", "blocks.20.hook_resid_post", 20),
        (
            GEMMA_2.replace("it-res", "pt-mlp"),
            "google/gemma-2-9b",
            "blocks.20.hook_mlp_out",
            20,
        ),
        (GEMMA_3, "google/gemma-3-4b-pt", "blocks.9.hook_resid_post", 9),
        (
            GEMMA_3.replace("4b", "270m").replace("resid_post", "attn_out_all"),
            "google/gemma-3-270m",
            "blocks.9.attn.hook_z",
            None,
        ),
        ("mine", None, None, None),
    ],
)
def test_its_folder_says_where_it_belongs(tmp_path, inside, model, hook, layer):
    data = interop.read(folder_of(tmp_path, inside)).data
    found = (data.get("model"), data.get("hook_name"), data.get("layer"))
    assert found == (model, hook, layer)


def test_gemma_scope_2_is_in_safetensors(tmp_path):
    stored = {n.replace("W_", "w_"): a for n, a in arrays().items()}
    save_file(stored, tmp_path / "params.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "jump_relu"}))
    ae = interop.read(tmp_path)
    np.testing.assert_array_equal(ae.params["w_dec"], arrays()["W_dec"])
    np.testing.assert_array_equal(ae.params["theta"], arrays()["threshold"])


@pytest.mark.parametrize("to", ["saelens", "dictionary_learning", "vsae_jax"])
def test_it_goes_to_other_formats(tmp_path, to, capfd):
    folder, out = folder_of(tmp_path, GEMMA_2), tmp_path / "out"
    assert call("convert", input=folder, to=to, out=out) == 0
    assert "gemma_scope jump_relu, 6 -> 10" in capfd.readouterr().out
    x = np.random.default_rng(1).normal(size=(64, D)).astype("f4")
    expected = x_hat(arrays(), x)
    np.testing.assert_allclose(vsae_jax.load(out)(x), expected, rtol=1e-5, atol=1e-5)
    card = (out / "README.md").read_text()
    assert "from | gemma_scope, average_l0_71/params.npz" in card
    assert "language model | google/gemma-2-9b-it" in card


def test_the_embeddings_scale_is_said(tmp_path):
    inside = "gemma-scope-2b-pt-res/embedding/width_4k/average_l0_6"
    ae = interop.read(folder_of(tmp_path, inside))
    assert "sqrt(d_model)" in ae.notes[0] and "hook_name" not in ae.data


@pytest.mark.parametrize(
    "changed, said",
    [
        ({"W_enc": arrays()["W_enc"].T}, "[10, 6], expected [6, 10]; it is transposed"),
        ({"b_enc": np.full(M, np.nan, "f4")}, "b_enc holds NaN"),
        ({"threshold": np.ones(3, "f4")}, "threshold has shape [3], expected [10]"),
        ({"affine_skip": np.ones(3, "f4")}, "unknown tensors: affine_skip"),
        ({"scaling_factor": np.full(M, 2.0)}, "scaling_factor other than 1"),
        ({"b_dec": np.array([object()])}, "b_dec.npy is not a plain array of <f8, <f4"),
        ({"b_dec": np.ones(D, ">f4")}, "b_dec.npy is not a plain array"),
    ],
)
def test_arrays_that_are_refused(tmp_path, changed, said):
    one_line(interop.read, folder_of(tmp_path, "mine", **changed), said=said)


@pytest.mark.parametrize(
    "inside",
    [
        "gemma-scope-2b-pt-transcoders/layer_0/width_16k/average_l0_76",
        "gemma-scope-2-4b-pt/transcoder_all/layer_0_width_16k_l0_big",
        "gemma-scope-2-4b-pt/clt/layer_0",
    ],
)
def test_a_transcoder_is_refused(tmp_path, inside):
    folder = folder_of(tmp_path, inside)
    one_line(interop.read, folder, said="from one activation to another")


def test_configs_that_are_refused(tmp_path):
    folder = folder_of(tmp_path, "mine")
    for config, said in [
        ({"hf_hook_point_out": "model.layers.3"}, "from one activation to another"),
        ({"architecture": "topk"}, "'topk' is not read; expected jump_relu"),
    ]:
        (folder / "config.json").write_text(json.dumps(config))
        one_line(interop.read, folder, said=said)


def npz(compression: int = zipfile.ZIP_STORED, **content: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, data in content.items():
            archive.writestr(f"{name}.npy", data)
    return file.getvalue()


def npy(header: str, data: bytes = b"") -> bytes:
    length = len(header).to_bytes(2, "little")
    return b"\x93NUMPY\x01\x00" + length + header.encode() + data


def header(shape: str, descr: str = "'<f4'") -> str:
    return f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}\n"


HOSTILE = {
    "no zip": (b"PK\x03\x04" + b"\0" * 100, "is not a .npz file"),
    "empty": (b"", "is not a .npz file"),
    "no array": (npz(a=b"x" * 100), "a.npy is not an array of NumPy's"),
    "cut": (npz(a=b"\x93NUMPY\x01\x00"), "is not a .npz file"),
    "oversized": (npz(a=npy(header("(1099511627776,)"))), "has 0"),
    "too short": (npz(a=npy(header("(2,)"), b"\0" * 4)), "needs 8 bytes and has 4"),
    "an object": (npz(a=npy(header("(1,)", "'|O'"), b"\0")), "is not a plain array"),
    "fields": (npz(a=npy(header("(1,)", "[('a', '<f4')]"))), "is not a plain array"),
    "code": (npz(a=npy(header("(__import__('os'),)"))), "is not a plain array"),
    "deep": (npz(a=npy(header("(" * 3000))), "is not a plain array"),
    "folders": (npz(**{"../a": npy(header("(0,)"))}), "an entry named '../a.npy'"),
    "zeros": (
        npz(zipfile.ZIP_DEFLATED, a=npy(header("(25000000,)"), bytes(10**8))),
        "over 4 times the",
    ),
    "many": (npz(**{f"a{i}": b"" for i in range(65)}), "over 64 arrays"),
}


@pytest.mark.parametrize("name", sorted(HOSTILE))
def test_hostile_files(tmp_path, name):
    content, said = HOSTILE[name]
    (tmp_path / NPZ).write_bytes(content)
    one_line(read_npz, tmp_path / NPZ, said=said)


def test_flipped_bytes_are_read_or_refused(tmp_path):
    np.savez(tmp_path / NPZ, **arrays())
    good, rng = (tmp_path / NPZ).read_bytes(), np.random.default_rng(0)
    refused = 0
    for _ in range(200):
        content = bytearray(good)
        for at in rng.integers(0, len(good), 2):
            content[at] = rng.integers(0, 256)
        (tmp_path / NPZ).write_bytes(content)
        try:
            read_npz(tmp_path / NPZ)
        except UserError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused > 100
