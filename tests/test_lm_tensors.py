"""Weights on disk: precision, buffers, and files that do not fit."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from test_lm_decoder import CONFIG, TOKENS, write_neox

from vsae_jax.lm import load_language_model
from vsae_jax.system.errors import UserError


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_weights_are_read_exactly(dtype, tmp_path):
    loaded = load_language_model(write_neox(tmp_path, dtype=dtype))
    stored = load_file(tmp_path / "model.safetensors")
    name = "gpt_neox.layers.2.mlp.dense_h_to_4h.weight"
    assert loaded.params["blocks"]["w_up"].dtype == jnp.float32
    np.testing.assert_array_equal(
        loaded.params["blocks"]["w_up"][2], stored[name].astype(np.float32).T
    )


BROKEN_WEIGHTS = {
    "missing": (
        lambda t: t.pop("gpt_neox.layers.1.mlp.dense_h_to_4h.bias"),
        "tensor gpt_neox.layers.1.mlp.dense_h_to_4h.bias is missing",
    ),
    "wrong shape": (
        lambda t: t.update({"embed_out.weight": np.zeros((60, 48), np.float32)}),
        r"tensor embed_out.weight is \(60, 48\), not \(61, 48\)",
    ),
    "unexpected": (
        lambda t: t.update({"gpt_neox.lora": np.zeros(3, np.float32)}),
        "tensor gpt_neox.lora is not gpt_neox's",
    ),
    "one layer too many": (
        lambda t: t.update({"gpt_neox.layers.3.attention.dense.bias": np.zeros(48)}),
        "tensor gpt_neox.layers.3.attention.dense.bias is not",
    ),
}


@pytest.mark.parametrize("case", BROKEN_WEIGHTS)
def test_weights_that_do_not_fit_are_named(case, tmp_path):
    change, message = BROKEN_WEIGHTS[case]
    folder = write_neox(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=message):
        load_language_model(folder)


def test_buffers_of_older_checkpoints_are_ignored(tmp_path):
    folder = write_neox(tmp_path)
    expected = load_language_model(folder).logits(TOKENS)[0]
    tensors = load_file(tmp_path / "model.safetensors")
    attention = "gpt_neox.layers.0.attention."
    tensors[attention + "bias"] = np.ones((1, 1, 64, 64), bool)
    tensors[attention + "masked_bias"] = np.float32([-1e9])
    tensors[attention + "rotary_emb.inv_freq"] = np.ones(2, np.float32)
    save_file(tensors, tmp_path / "model.safetensors")
    ours = load_language_model(folder).logits(TOKENS)[0]
    np.testing.assert_array_equal(ours, expected)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"hidden_act": "mish"}, "hidden_act='mish'"),
        ({"rope_scaling": {"type": "longrope"}}, "rotary scaling 'longrope'"),
        ({"rope_scaling": {"type": "linear"}}, "scaling 'linear' lacks factor"),
        ({"quantization_config": {"bits": 4}}, "not run quantization_config="),
        ({"num_attention_heads": 5}, "hidden_size=48 must be a multiple"),
        ({"hidden_size": None}, "lacks hidden_size"),
    ],
)
def test_configs_that_cannot_be_run_are_refused(changes, message, tmp_path):
    folder = write_neox(tmp_path)
    config = {**CONFIG, **changes}
    config = {key: value for key, value in config.items() if value is not None}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=message):
        load_language_model(folder)
