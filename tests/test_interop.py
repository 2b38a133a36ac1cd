"""Formats: round trips are the identity, and what does not fit is refused."""

import dataclasses
import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
from autoencoders import DATA, assert_same, make, trip, write, z_and_x_hat
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from vsae_jax import interop
from vsae_jax.autoencoder import sae
from vsae_jax.interop.canonical import (
    RULES,
    THRESHOLDS,
    folded,
    not_subtracting,
    subtracting,
)
from vsae_jax.interop.pt import read_pt
from vsae_jax.interop.pt_write import write_pt
from vsae_jax.system.errors import UserError

FORMATS = list(interop.FORMATS)
FOREIGN = [name for name in FORMATS if name != "vsae_jax"]
SUBTRACTING = ("dictionary_learning", "sparsify", "openai")


def fits(format: str, rule: str, layer_norm: bool) -> bool:
    if layer_norm and (format in ("dictionary_learning", "sparsify")):
        return False
    if layer_norm and format == "openai" and rule in ("relu", "none"):
        return False
    if format == "openai" and (rule in THRESHOLDS or rule.startswith("gated")):
        return False
    if rule == "vaease":
        return format == "vsae_jax"
    return format != "sparsify" or rule in ("relu_topk", "topk", "abstopk")


def refused(call, *arguments) -> str:
    with pytest.raises(UserError) as error:
        call(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


autoencoders = st.builds(
    make,
    rule=st.sampled_from(RULES),
    d_model=st.integers(2, 9),
    d_sae=st.integers(3, 12),
    k=st.integers(1, 3),
    subtract_b_dec=st.booleans(),
    scale=st.sampled_from([1.0, 1.0, 0.113, 8.7, 1e-3, 250.0]),
    centred=st.booleans(),
    head=st.booleans(),
    layer_norm=st.booleans(),
    seed=st.integers(0, 10**6),
)


@settings(deadline=None, max_examples=150)
@given(ae=autoencoders, format=st.sampled_from(FORMATS))
def test_a_round_trip_is_the_identity(ae, format):
    with tempfile.TemporaryDirectory() as folder:
        if not fits(format, ae.rule, ae.layer_norm):
            refused(interop.FORMATS[format].rewritten, ae)
            return
        once = trip(ae, format, Path(folder) / "once")
        unfolded = ae.scale == 1 and not ae.mean.any()
        kept = ae.config.subtract_b_dec or format not in SUBTRACTING
        if (format, ae.rule) == ("dictionary_learning", "jump_relu"):
            kept = not ae.config.subtract_b_dec
        if format == "vsae_jax" or (unfolded and kept):
            assert_same(ae, once)
        assert_close(ae, once, 1e-6)
        assert_same(once, trip(once, format, Path(folder) / "twice"))


@settings(deadline=None, max_examples=100)
@given(
    ae=autoencoders, formats=st.lists(st.sampled_from(FORMATS), min_size=2, max_size=4)
)
def test_a_chain_of_formats_is_the_identity(ae, formats):
    with tempfile.TemporaryDirectory() as folder:
        there = ae
        for i, format in enumerate(formats):
            if fits(format, ae.rule, ae.layer_norm):
                there = trip(there, format, Path(folder) / str(i))
        assert_close(ae, there, 1e-6)
        assert (there.rule, there.k, there.data) == (ae.rule, ae.k, ae.data)


def assert_close(a, b, tolerance):
    """The same function, relative to the largest of the numbers added up."""
    rng = np.random.default_rng(1)
    x = rng.normal(size=(5, a.config.d_model)) / float(a.scale) + a.mean
    f = rng.uniform(size=(5, a.config.d_sae))
    size = max(1.0, *(float(np.abs(p).max()) for p in a.params.values()))
    size *= a.config.d_model * max(1.0, float(a.scale) * np.abs(a.mean).max() * 10)
    sizes = size**2, size * a.config.d_sae / float(a.scale), size**2, size
    got = zip(z_and_x_hat(a, x, f), z_and_x_hat(b, x, f), sizes, strict=True)
    for ours, theirs, largest in got:
        assert np.abs(ours - theirs).max() <= tolerance * largest


@pytest.mark.parametrize("subtract_b_dec", [True, False])
def test_folding_is_sae_fold(subtract_b_dec):
    ae = make(scale=8.7, centred=True, head=True, subtract_b_dec=subtract_b_dec)
    expected, config = sae.fold(ae.variables, ae.config)
    got = folded(ae, units="scaled")
    for name, array in expected["params"].items():
        np.testing.assert_allclose(got.params[name], array, rtol=1e-5, atol=1e-6)
    assert got.config == config and got.latent_scale == 1


def test_raw_units_leave_the_weights_and_scale_the_biases():
    ae = make(scale=0.25)
    got = folded(ae, units="raw")
    np.testing.assert_array_equal(got.params["w_enc"], ae.params["w_enc"])
    np.testing.assert_array_equal(got.params["w_dec"], ae.params["w_dec"])
    np.testing.assert_array_equal(got.params["b_enc"], ae.params["b_enc"] * 4)
    np.testing.assert_array_equal(got.params["b_dec"], ae.params["b_dec"] * 4)
    assert (got.latent_scale, got.config.decoder_norm) == (4, "unit")


def test_subtracting_adds_b_dec_through_the_encoder():
    ae = make(subtract_b_dec=False)
    got, p = subtracting(ae), ae.params
    expected = p["b_enc"] + p["b_dec"].astype("f8") @ p["w_enc"]
    np.testing.assert_allclose(got.params["b_enc"], expected, rtol=1e-6)


def test_not_subtracting_takes_it_out_again():
    ae = make()
    there = not_subtracting(ae)
    assert not there.config.subtract_b_dec
    expected = ae.params["b_enc"] - ae.params["b_dec"].astype("f8") @ ae.params["w_enc"]
    np.testing.assert_allclose(there.params["b_enc"], expected, rtol=1e-6)
    back = subtracting(there).params["b_enc"]
    np.testing.assert_allclose(back, ae.params["b_enc"], rtol=1e-5, atol=1e-6)


# What the other libraries' files must look like (docs/decisions/formats.md).


def test_saelens_names_and_orientation(tmp_path):
    ae = make(d_model=4, d_sae=7, rule="topk", head=True)
    folder = write(ae, "saelens", tmp_path / "o")
    arrays = load_file(folder / "sae_weights.safetensors")
    shapes = {"W_enc": (4, 7), "b_enc": (7,), "W_dec": (7, 4), "b_dec": (4,)}
    assert {n: a.shape for n, a in arrays.items()} == shapes
    c = json.loads((folder / "cfg.json").read_text())
    assert (c["architecture"], c["k"], c["d_in"], c["d_sae"]) == ("topk", 3, 4, 7)
    assert c["apply_b_dec_to_input"] is True and c["normalize_activations"] == "none"
    assert c["rescale_acts_by_decoder_norm"] is False
    metadata = c["metadata"]
    assert metadata["hook_name"] == DATA["hook_name"] and metadata["prepend_bos"]
    assert metadata["sae_lens_version"].startswith("6.")
    extra = load_file(folder / "vsae_extra.safetensors")
    assert {n: a.shape for n, a in extra.items()} == {"w_var": (4, 7), "b_var": (7,)}


@pytest.mark.parametrize(
    "rule, dict_class, bias",
    [("relu_topk", "AutoEncoderTopK", "b_dec"), ("relu", "AutoEncoder", "bias")],
)
def test_dictionary_learning_names_and_orientation(tmp_path, rule, dict_class, bias):
    ae = make(d_model=4, d_sae=7, rule=rule)
    folder = write(ae, "dictionary_learning", tmp_path / "o")
    arrays = read_pt(folder / "ae.pt")
    shapes = {"encoder.weight": (7, 4), "encoder.bias": (7,), bias: (4,)}
    shapes |= {"decoder.weight": (4, 7)}
    shapes |= {"k": (), "threshold": ()} if rule == "relu_topk" else {}
    assert {n: a.shape for n, a in arrays.items()} == shapes
    trainer = json.loads((folder / "config.json").read_text())["trainer"]
    assert (trainer["dict_class"], trainer["layer"]) == (dict_class, 3)
    assert (trainer["activation_dim"], trainer["dict_size"]) == (4, 7)
    assert trainer.get("k") == (3 if rule == "relu_topk" else None)
    if rule == "relu_topk":
        assert (arrays["k"].dtype, int(arrays["k"])) == (np.int32, 3)
        assert (arrays["threshold"].dtype, float(arrays["threshold"])) == ("f4", -1)


def test_files_with_thresholds(tmp_path):
    batch, jump = (make(d_model=4, d_sae=7, rule=rule) for rule in THRESHOLDS)
    threshold, theta = batch.params["threshold"], jump.params["theta"]
    for ae, each in ((batch, np.full(7, threshold)), (jump, theta)):
        folder = write(ae, "saelens", tmp_path / f"saelens-{ae.rule}")
        c = json.loads((folder / "cfg.json").read_text())
        assert c["architecture"] == "jumprelu" and "k" not in c
        arrays = load_file(folder / "sae_weights.safetensors")
        np.testing.assert_array_equal(arrays["threshold"], each)
        (folder / "vsae_jax_export.json").unlink()
        assert interop.read(folder).rule == "jump_relu"
    folder = write(batch, "dictionary_learning", tmp_path / "dl-batch")
    arrays = read_pt(folder / "ae.pt")
    assert arrays.keys() == {*"encoder.weight encoder.bias decoder.weight".split()} | {
        *"b_dec k threshold".split()
    }
    assert (arrays["threshold"].shape, arrays["threshold"]) == ((), threshold)
    trainer = json.loads((folder / "config.json").read_text())["trainer"]
    assert (trainer["dict_class"], trainer["k"]) == ("BatchTopKSAE", 3)
    folder = write(jump, "dictionary_learning", tmp_path / "dl-jump")
    arrays = {n: a.shape for n, a in read_pt(folder / "ae.pt").items()}
    shapes = {"W_enc": (4, 7), "b_enc": (7,), "W_dec": (7, 4), "b_dec": (4,)}
    assert arrays == shapes | {"threshold": (7,)}
    trainer = json.loads((folder / "config.json").read_text())["trainer"]
    assert trainer["dict_class"] == "JumpReluAutoEncoder" and "k" not in trainer


def test_files_with_a_gate(tmp_path):
    ae = make(d_model=4, d_sae=7, rule="gated")
    folder = write(ae, "saelens", tmp_path / "saelens")
    c = json.loads((folder / "cfg.json").read_text())
    assert c["architecture"] == "gated" and "k" not in c
    arrays = {n: a.shape for n, a in load_file(folder / c_weights(folder)).items()}
    shapes = {"W_enc": (4, 7), "W_dec": (7, 4), "b_dec": (4,)}
    assert arrays == shapes | dict.fromkeys(("b_gate", "r_mag", "b_mag"), (7,))
    folder = write(ae, "dictionary_learning", tmp_path / "dl")
    arrays = {n: a.shape for n, a in read_pt(folder / "ae.pt").items()}
    shapes = {"encoder.weight": (7, 4), "decoder.weight": (4, 7), "decoder_bias": (4,)}
    assert arrays == shapes | dict.fromkeys(("gate_bias", "r_mag", "mag_bias"), (7,))
    trainer = json.loads((folder / "config.json").read_text())["trainer"]
    assert trainer["dict_class"] == "GatedAutoEncoder" and "k" not in trainer


def c_weights(folder: Path) -> str:
    (name,) = (path.name for path in folder.glob("sae_weights*"))
    return name


def test_a_nested_decoder_is_a_matryoshka(tmp_path):
    ae = make(d_model=4, d_sae=7, rule="batch_topk")
    config = dataclasses.replace(ae.config, prefixes="2:3")
    ae = dataclasses.replace(ae, config=config, data={})
    folder = write(ae, "dictionary_learning", tmp_path / "dl")
    arrays = read_pt(folder / "ae.pt")
    np.testing.assert_array_equal(arrays["group_sizes"], [2, 1, 4])
    assert arrays["W_enc"].shape == (4, 7) and arrays["group_sizes"].dtype == np.int64
    trainer = json.loads((folder / "config.json").read_text())["trainer"]
    assert trainer["dict_class"] == "MatryoshkaBatchTopKSAE"
    (folder / "vsae_jax_export.json").unlink()
    assert interop.read(folder).config.prefixes == "2:3"
    wrong = np.array([2, 1, 5])
    write_pt(folder / "ae.pt", arrays | {"group_sizes": wrong})
    assert "do not add up" in refused(interop.read, folder)


@pytest.mark.parametrize("rescale", [False, True])
def test_a_batchtopk_in_training_is_read(tmp_path, rescale):
    """As SAELens' `save_model` writes a MatryoshkaBatchTopKTrainingSAE: its threshold
    is that of unit decoder rows where they are rescaled."""
    ae = make(d_model=4, d_sae=7, rule="batch_topk")
    folder = write(ae, "saelens", tmp_path / "o")
    (folder / "vsae_jax_export.json").unlink()
    weights = folder / c_weights(folder)
    arrays = load_file(weights)
    one = np.float64(arrays.pop("threshold")[0])
    save_file(arrays | {"topk_threshold": np.array(one)}, weights)
    known = {"architecture": "matryoshka_batchtopk", "k": 2.6, "topk_threshold_lr": 0.1}
    known |= {"matryoshka_widths": [2, 3, 7], "rescale_acts_by_decoder_norm": rescale}
    change(folder / "cfg.json", **known)
    got = interop.read(folder)
    assert (got.rule, got.config.k, got.config.prefixes) == ("batch_topk", 3, "2:3")
    assert got.params["threshold"] == np.float32(one)
    norm = np.linalg.norm(ae.params["w_dec"], axis=1) if rescale else np.ones(7)
    np.testing.assert_allclose(got.params["b_enc"], ae.params["b_enc"] * norm, 1e-6)
    change(folder / "cfg.json", matryoshka_widths="2, 3")
    assert "matryoshka_widths is not a list" in refused(interop.read, folder)


def test_a_threshold_that_is_not_set_is_0(tmp_path):
    ae = make(rule="batch_topk")
    folder = write(ae, "dictionary_learning", tmp_path / "o")
    (folder / "vsae_jax_export.json").unlink()
    arrays = read_pt(folder / "ae.pt") | {"threshold": np.array(-1, np.float32)}
    write_pt(folder / "ae.pt", arrays)
    assert interop.read(folder).params["threshold"] == 0


@pytest.mark.parametrize("rule", ["relu_topk", "jump_relu", "gated"])
def test_a_note_of_the_other_kind_of_rule_is_refused(tmp_path, rule):
    folder = write(make(rule=rule, data={}), "saelens", tmp_path / "o")
    others = {"relu_topk": "batch_topk", "jump_relu": "relu", "gated": "relu"}
    other = others[rule]
    change(folder / "vsae_jax_export.json", selection=other)
    assert "on the thresholds" in refused(interop.read, folder)


def test_sparsify_names_and_orientation(tmp_path):
    folder = write(make(d_model=4, d_sae=8), "sparsify", tmp_path / "layers.3")
    arrays = load_file(folder / "sae.safetensors")
    shapes = {"encoder.weight": (8, 4), "encoder.bias": (8,), "W_dec": (8, 4)}
    assert {n: a.shape for n, a in arrays.items()} == shapes | {"b_dec": (4,)}
    c = json.loads((folder / "cfg.json").read_text())
    assert (c["activation"], c["k"], c["d_in"], c["num_latents"]) == ("topk", 3, 4, 8)
    assert c["transcode"] is c["skip_connection"] is False
    (folder / "vsae_jax_export.json").unlink()
    assert interop.read(folder).data == {
        "layer": 3,
        "hook_name": "blocks.3.hook_resid_post",
    }


def test_openai_names_orientation_and_layer_norm(tmp_path):
    folder = write(make(d_model=4, d_sae=7), "openai", tmp_path / "o")
    state = read_pt(folder / "autoencoder.pt")
    assert state["activation"] == "TopK"
    assert state["activation_state_dict"] == {"k": 3, "postact_fn": "ReLU"}
    assert state["encoder.weight"].shape == (7, 4)
    assert state["decoder.weight"].shape == (4, 7)
    assert state["stats_last_nonzero"].dtype == np.int64
    said = json.loads((folder / "vsae_jax_export.json").read_text())
    assert said["input_norm"] == "none" and not interop.read(folder).layer_norm
    (folder / "vsae_jax_export.json").unlink()
    assert interop.read(folder).layer_norm


# What is read and not written.


def vsae_topk(tmp_path, *, april: bool, head: bool = False):
    rng = np.random.default_rng(3)
    arrays = {
        "k": np.array(2, np.int32),
        "encoder.weight": rng.normal(size=(7, 4)),
        "encoder.bias": rng.normal(size=7),
        "decoder.weight": rng.normal(size=(4, 7)),
        "decoder.bias" if april else "bias": rng.normal(size=4),
    }
    if head:
        arrays |= {"var_encoder.weight": rng.normal(size=(7, 4))}
        arrays |= {"var_encoder.bias": rng.normal(size=7)}
    arrays = {n: a if n == "k" else np.float32(a) for n, a in arrays.items()}
    trainer = {"dict_class": "VSAETopK", "k": 2, "activation_dim": 4, "dict_size": 7}
    trainer |= {"layer": 3, "lm_name": "EleutherAI/pythia-70m-deduped"}
    (tmp_path / "config.json").write_text(json.dumps({"trainer": trainer}))
    write_pt(tmp_path / "ae.pt", arrays)
    return arrays


@pytest.mark.parametrize("april", [True, False])
def test_the_authors_vsae_topk(tmp_path, april):
    arrays = vsae_topk(tmp_path, april=april, head=True)
    ae = interop.read(tmp_path)
    assert (ae.rule, ae.k, ae.config.subtract_b_dec) == ("relu_topk", 2, not april)
    np.testing.assert_array_equal(ae.params["w_enc"], arrays["encoder.weight"].T)
    np.testing.assert_array_equal(ae.params["w_dec"], arrays["decoder.weight"].T)
    np.testing.assert_array_equal(ae.params["w_var"], arrays["var_encoder.weight"].T)
    assert ae.data["layer"] == 3 and "norm_factor" in ae.notes[0]


def test_saelens_rescaling_by_the_decoders_norm_is_folded(tmp_path):
    folder = write(make(), "saelens", tmp_path / "o")
    (folder / "vsae_jax_export.json").unlink()
    change(folder / "cfg.json", rescale_acts_by_decoder_norm=True)
    ae, p = interop.read(folder), make().params
    norm = np.linalg.norm(p["w_dec"], axis=1)
    np.testing.assert_allclose(ae.params["w_enc"], p["w_enc"] * norm, rtol=1e-6)
    np.testing.assert_allclose(ae.params["b_enc"], p["b_enc"] * norm, rtol=1e-6)
    ones = np.linalg.norm(ae.params["w_dec"], axis=1)
    np.testing.assert_allclose(ones, 1, rtol=1e-6)


OLD = {"model_name": "gemma-2b", "hook_point": "blocks.3.hook_resid_post"}
OLD |= {"context_size": 128, "l1_coefficient": 5, "use_ghost_grads": False}


def of_before_6(tmp_path, rule: str = "relu_topk", **values) -> Path:
    """What SAELens 6 writes, with a config of before it."""
    folder = write(make(rule=rule, data={}), "saelens", tmp_path / "o")
    (folder / "vsae_jax_export.json").unlink()
    (folder / "cfg.json").write_text(
        json.dumps(OLD | {"d_in": 6, "d_sae": 10} | values)
    )
    return folder


@pytest.mark.parametrize(
    "rule, values",
    [
        ("relu", {}),
        ("relu", {"activation_fn_str": "relu", "normalize_activations": False}),
        ("jump_relu", {"architecture": "jumprelu", "apply_b_dec_to_input": False}),
        ("relu_topk", {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 3}}),
        ("relu_topk", {"architecture": "topk", "k": 3, "normalize_activations": None}),
    ],
)
def test_saelens_before_6(tmp_path, rule, values):
    folder = of_before_6(tmp_path, rule, **values)
    path = folder / "sae_weights.safetensors"
    save_file(load_file(path) | {"scaling_factor": np.ones(10, "f4")}, path)
    ae = interop.read(folder)
    subtracts = values.get("apply_b_dec_to_input", True)
    assert (ae.rule, ae.config.subtract_b_dec) == (rule, subtracts)
    assert ae.k == (3 if rule == "relu_topk" else None)
    np.testing.assert_array_equal(ae.params["w_dec"], make(rule=rule).params["w_dec"])
    assert ae.data == {
        "model": "google/gemma-2b",
        "hook_name": "blocks.3.hook_resid_post",
        "layer": 3,
        "context_length": 128,
        "bos": "keep",
    }


@pytest.mark.parametrize(
    "values, said",
    [
        ({"activation_fn": "tanh-relu"}, "activation_fn 'tanh-relu' of a 'standard'"),
        ({"activation_fn": "topk"}, "is not read; expected relu, or topk with its k"),
        ({"normalize_activations": True}, "'expected_average_only_in' is not read"),
        ({"finetuning_scaling_factor": True}, "finetuning_scaling_factor='True'"),
        ({"is_transcoder": True}, "is_transcoder='True' is not read"),
        ({"hook_point": "blocks.3.attn.hook_z"}, "reshape_activations is not read"),
        ({"architecture": "temporal"}, "'temporal' is not read"),
        ({"architecture": []}, "a list is not read"),
        ({"activation_fn_kwargs": {"k": 3}}, "with a dict is not read"),
    ],
)
def test_configs_of_before_6_that_are_refused(tmp_path, values, said):
    assert said in refused(interop.read, of_before_6(tmp_path, "relu", **values))


def test_a_scaling_factor_of_before_6_is_refused(tmp_path):
    folder = of_before_6(tmp_path, "relu")
    path = folder / "sae_weights.safetensors"
    save_file(load_file(path) | {"scaling_factor": np.full(10, 2, "f4")}, path)
    assert "unknown tensors: scaling_factor" in refused(interop.read, folder)


def test_saelens_says_that_rows_are_centred(tmp_path):
    kwargs = {"center_writing_weights": True}
    folder = of_before_6(tmp_path, "relu", model_from_pretrained_kwargs=kwargs)
    assert interop.read(folder).data["center_residual"] is True


def test_a_threshold_is_named_as_lost(tmp_path):
    folder = write(make(), "dictionary_learning", tmp_path / "o")
    (folder / "vsae_jax_export.json").unlink()
    arrays = read_pt(folder / "ae.pt") | {"threshold": np.array(0.5, np.float32)}
    write_pt(folder / "ae.pt", arrays)
    assert "threshold=0.5 was not carried over" in interop.read(folder).notes[0]


# What is refused.


def change(path: Path, **values) -> None:
    stored = json.loads(path.read_text()) | values
    kept = {n: v for n, v in stored.items() if v != "DROP"}
    path.write_text(json.dumps(kept))


@pytest.mark.parametrize(
    "values, said",
    [
        ({"architecture": "temporal"}, "'temporal' is not read; expected stand"),
        ({"architecture": "gated"}, "sae_weights.safetensors lacks b_gate"),
        ({"architecture": "jumprelu"}, "sae_weights.safetensors lacks threshold"),
        ({"k": "DROP"}, "says TopK but no k"),
        ({"k": 0}, "k is '0', expected a whole number of at least 1"),
        ({"k": 11}, "k=11 must not exceed d_sae=10"),
        ({"k": True}, "k is 'True', expected a whole number"),
        ({"d_sae": 11}, "says d_in='6', d_sae='11', but sae_weights"),
        ({"normalize_activations": "expected_average_only_in"}, "fold it"),
        ({"reshape_activations": "hook_z"}, "expected none"),
        ({"apply_b_dec_to_input": "DROP"}, "must be true or false"),
        (
            {"hook_fn": 1, "jump": 2},
            "unknown keys: hook_fn, jump; expected architecture,",
        ),
    ],
)
def test_saelens_configs_that_are_refused(tmp_path, values, said):
    folder = write(make(), "saelens", tmp_path / "o")
    change(folder / "cfg.json", **values)
    assert said in refused(interop.read, folder)


@pytest.mark.parametrize(
    "edit, said",
    [
        (
            lambda a: a | {"threshold": a["b_enc"]},
            "unknown tensors: threshold; expected W_e",
        ),
        (lambda a: {n: a[n] for n in a if n != "W_dec"}, "lacks W_dec"),
        (lambda a: a | {"W_enc": a["W_enc"].T.copy()}, "[10, 6], expected [6, 10]; it"),
        (lambda a: a | {"W_dec": a["W_dec"].T.copy()}, "is transposed"),
        (lambda a: a | {"b_enc": a["b_enc"][:4]}, "d_sae='10', but"),
        (lambda a: a | {"b_enc": a["W_enc"]}, "expected one dimension"),
        (lambda a: a | {"b_dec": np.full(6, np.nan, "f4")}, "b_dec holds NaN"),
        (lambda a: a | {"W_enc": a["W_enc"].astype("i4")}, "is of int32, expected flo"),
    ],
)
def test_saelens_tensors_that_are_refused(tmp_path, edit, said):
    folder = write(make(), "saelens", tmp_path / "o")
    path = folder / "sae_weights.safetensors"
    save_file(edit(load_file(path)), path)
    assert said in refused(interop.read, folder)


@pytest.mark.parametrize(
    "values, said",
    [
        (
            {"dict_class": "AutoEncoderNew"},
            "'AutoEncoderNew' is not read; expected",
        ),
        ({"k": 4}, "says k='4' but ae.pt has k=3"),
        ({"dict_size": 5}, "dict_size='5', but ae.pt has 6, 10"),
    ],
)
def test_dictionary_learning_configs_that_are_refused(tmp_path, values, said):
    folder = write(make(), "dictionary_learning", tmp_path / "o")
    trainer = json.loads((folder / "config.json").read_text())["trainer"]
    change(folder / "config.json", trainer=trainer | values)
    assert said in refused(interop.read, folder)


@pytest.mark.parametrize(
    "values, said",
    [
        ({"activation": "groupmax"}, "'groupmax' is not read"),
        ({"transcode": True}, "transcode='True' is not read"),
        ({"skip_connection": True}, "skip_connection='True' is not read"),
        ({"signed": True}, "signed='True' is not read"),
        ({"k": "DROP"}, "says TopK but no k"),
        ({"d_in": 7}, "says d_in='7'"),
        ({"groups": 4}, "has unknown keys: groups; expected d_in, k"),
    ],
)
def test_sparsify_configs_that_are_refused(tmp_path, values, said):
    folder = write(make(), "sparsify", tmp_path / "o")
    change(folder / "cfg.json", **values)
    assert said in refused(interop.read, folder)


@pytest.mark.parametrize(
    "values, said",
    [
        ({"activation": "JumpReLU"}, "'JumpReLU' is not read"),
        ({"activation_state_dict": {"postact_fn": "ReLU"}}, "TopK but no k"),
        ({"activation_state_dict": {"k": 3, "postact_fn": "GELU"}}, "'GELU'"),
        ({"pre_bias": "a string"}, "holds more than tensors"),
    ],
)
def test_openai_files_that_are_refused(tmp_path, values, said):
    folder = write(make(), "openai", tmp_path / "o")
    path = folder / "autoencoder.pt"
    write_pt(path, read_pt(path) | values)
    assert said in refused(interop.read, folder)


def test_a_folder_is_recognised_by_its_files(tmp_path):
    write(make(), "sparsify", tmp_path / "many" / "layers.3")
    said = refused(interop.read, tmp_path / "many")
    assert "name one of its folders: layers.3; expected config.json with sae" in said
    assert "is not a folder; expected" in refused(interop.read, tmp_path / "none")
    folder = write(make(), "saelens", tmp_path / "two")
    (folder / "sae.safetensors").touch()
    assert "looks like saelens and sparsify" in refused(interop.read, folder)


def test_a_note_of_other_weights_is_refused(tmp_path):
    a = write(make(seed=1), "saelens", tmp_path / "a")
    b = write(make(seed=2, rule="topk"), "saelens", tmp_path / "b")
    name = "vsae_jax_export.json"
    (a / name).write_bytes((b / name).read_bytes())
    assert "does not belong to sae_weights.safetensors" in refused(interop.read, a)


@pytest.mark.parametrize(
    "values, said",
    [
        ({"format_version": 2}, "format_version is '2'"),
        ({"selection": "jumprelu"}, "selection or input_norm"),
        ({"k": 4}, "contradicts the files beside it"),
        ({"notes": [1]}, "notes"),
        ({"surprise": 1}, "surprise"),
        ({"run": {"data": {}, "train": None}}, "SAEConfig does not match"),
    ],
)
def test_notes_that_are_refused(tmp_path, values, said):
    folder = write(make(), "saelens", tmp_path / "o")
    change(folder / "vsae_jax_export.json", **values)
    assert said in refused(interop.read, folder)


def test_a_run_of_another_rule_is_refused(tmp_path):
    folder = write(make(), "saelens", tmp_path / "o")
    run = json.loads((folder / "vsae_jax_export.json").read_text())["run"]
    other = dataclasses.asdict(make(rule="abstopk").config)
    change(folder / "vsae_jax_export.json", run=run | {"sae": other})
    assert "its run does not fit the files" in refused(interop.read, folder)


@pytest.mark.parametrize("k, postact_fn", [(3, "ReLU"), (4, "ReLU"), (3, "Identity")])
def test_openai_says_its_settings_twice(tmp_path, k, postact_fn):
    folder = write(make(), "openai", tmp_path / "o")
    (folder / "vsae_jax_export.json").unlink()
    path = folder / "autoencoder.pt"
    twice = {"activation.k": k, "activation.postact_fn": postact_fn}
    write_pt(path, read_pt(path) | twice)
    if (k, postact_fn) == (3, "ReLU"):
        assert interop.read(folder).k == 3
    else:
        assert "contradicts its state" in refused(interop.read, folder)
