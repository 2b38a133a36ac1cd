"""Every family in JAX: each residual and the logits equal transformers', in float32."""

import json
import os

import jax.numpy as jnp
import numpy as np
import pytest
from test_lm_decoder import neox_stories

from vsae_jax.lm import Traceable, load_language_model
from vsae_jax.system.errors import UserError

TOLERANCE = 1e-4
TOKENS = np.random.default_rng(0).integers(3, 61, size=(2, 17))
IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SIZES = IDS | {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}
WIDE_HEADS = SIZES | {"head_dim": 12}
NEOX = SIZES | {"num_key_value_heads": 4}
GPT2 = IDS | {"vocab_size": 61, "n_embd": 32, "n_layer": 3, "n_head": 4}
GPT2 |= {"n_positions": 64}
GEMMA = WIDE_HEADS | {"query_pre_attn_scalar": 7, "sliding_window": 5}


def rope(kind: str, **settings) -> dict:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 100.0, **settings}}


LLAMA3 = rope(
    "llama3",
    factor=4.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=16,
)
YARN = rope("yarn", factor=4.0, original_max_position_embeddings=16)
# Name -> transformers' config class, its settings.
CASES = {
    "neox": ("GPTNeoX", NEOX),
    "neox serial": ("GPTNeoX", NEOX | {"use_parallel_residual": False}),
    "neox bare": (
        "GPTNeoX",
        NEOX
        | {"use_parallel_residual": False, "attention_bias": False}
        | {"tie_word_embeddings": True, "hidden_act": "gelu_new"}
        | {"layer_norm_eps": 1e-2},
    ),
    "neox half turned": (
        "GPTNeoX",
        NEOX | rope("linear", factor=2.0, partial_rotary_factor=0.5),
    ),
    "gpt2": ("GPT2", GPT2),
    "gpt2 untied": (
        "GPT2",
        GPT2
        | {"tie_word_embeddings": False, "scale_attn_weights": False}
        | {"n_inner": 40, "activation_function": "quick_gelu"},
    ),
    "llama": ("Llama", SIZES),
    "llama one key": ("Llama", SIZES | {"num_key_value_heads": 1}),
    "llama biases": (
        "Llama",
        WIDE_HEADS
        | {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    ),
    "llama3 scaling": ("Llama", SIZES | LLAMA3),
    "llama linear scaling": ("Llama", SIZES | rope("linear", factor=3.0)),
    "llama dynamic scaling": ("Llama", SIZES | rope("dynamic", factor=3.0)),
    "mistral": ("Mistral", SIZES | {"sliding_window": 5}),
    "mistral no window": ("Mistral", WIDE_HEADS | {"sliding_window": None}),
    "qwen2": ("Qwen2", SIZES | YARN),
    "qwen2 windows": (
        "Qwen2",
        SIZES
        | {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3", WIDE_HEADS),
    "qwen3 biases": (
        "Qwen3",
        WIDE_HEADS | {"attention_bias": True, "tie_word_embeddings": True},
    ),
    "gemma2": ("Gemma2", GEMMA),
    "gemma2 uncapped": (
        "Gemma2",
        GEMMA
        | {"attn_logit_softcapping": None, "final_logit_softcapping": None}
        | {"attention_bias": True, "tie_word_embeddings": False},
    ),
    "gemma3": ("Gemma3Text", GEMMA | {"sliding_window_pattern": 2}),
    "gemma3 scaled": (
        "Gemma3Text",
        GEMMA
        | {
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "final_logit_softcapping": 4.0,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
                "full_attention": {
                    "rope_type": "linear",
                    "factor": 8.0,
                    "rope_theta": 1e3,
                },
            },
        },
    ),
}


def save_random(family: str, settings: dict, folder, **how) -> str:
    """A small random model of a family, as transformers saves it."""
    torch = pytest.importorskip("torch", reason="parity needs torch")
    import transformers

    config = getattr(transformers, f"{family}Config")(**settings)
    module = transformers.AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.3, generator=generator)
    module.save_pretrained(folder, **how)
    return str(folder)


def reference(folder: str, tokens):
    """transformers' own logits and residuals, by hooks that this test sets."""
    torch = pytest.importorskip("torch", reason="parity needs torch")
    from transformers import AutoModelForCausalLM

    # Its fast attention knows no soft caps.
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    residuals = []

    def hook(module, args, output):
        residuals.append(output.numpy())

    inner = model.base_model
    for layer in inner.h if hasattr(inner, "h") else inner.layers:
        layer.register_forward_hook(hook)
    with torch.no_grad():
        logits = model(torch.as_tensor(tokens)).logits.numpy()
    return logits, residuals


def assert_equal_to_transformers(folder: str, tokens):
    model = load_language_model(folder, backend="jax", dtype="float32")
    logits, residuals = reference(folder, tokens)
    assert len(residuals) == model.n_layers
    for layer, residual in enumerate(residuals):
        ours = model.residual(tokens, layer)
        assert ours.dtype == jnp.float32
        np.testing.assert_allclose(
            ours, residual, atol=TOLERANCE, rtol=0, err_msg=f"block {layer}"
        )
    np.testing.assert_allclose(model.logits(tokens)[0], logits, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("case", CASES)
def test_logits_and_every_residual_equal_transformers(case, tmp_path):
    assert_equal_to_transformers(save_random(*CASES[case], tmp_path), TOKENS)


def test_a_model_in_shards(tmp_path):
    folder = save_random("Llama", SIZES, tmp_path, max_shard_size="20KB")
    assert not (tmp_path / "model.safetensors").exists()
    assert_equal_to_transformers(folder, TOKENS)


def test_weights_of_the_bare_model(tmp_path):
    """GPT-2's own files on the hub lack the prefix, and carry masks."""
    from safetensors.numpy import load_file, save_file

    folder = save_random("GPT2", GPT2, tmp_path)
    logits = load_language_model(folder).logits(TOKENS)[0]
    path = tmp_path / "model.safetensors"
    bare = {k.removeprefix("transformer."): v for k, v in load_file(path).items()}
    bare["h.0.attn.bias"] = np.ones((1, 1, 64, 64), np.float32)
    save_file(bare, path, metadata={"format": "pt"})
    np.testing.assert_array_equal(load_language_model(folder).logits(TOKENS)[0], logits)


def test_the_trained_model():
    tokens = np.random.default_rng(1).integers(0, 2048, size=(2, 128))
    assert_equal_to_transformers(neox_stories(), tokens)


def test_smollm2():
    """SmolLM2-135M, where a variable names its folder."""
    folder = os.environ.get("VSAE_JAX_SMOLLM2")
    if not folder:
        pytest.skip("VSAE_JAX_SMOLLM2 names no folder of SmolLM2-135M")
    tokens = np.random.default_rng(1).integers(3, 49152, size=(1, 64))
    model = load_language_model(folder, backend="jax", dtype="float32")
    logits, residuals = reference(folder, tokens)
    # A row's first position has entries in the thousands.
    for layer, residual in enumerate(residuals):
        scale = np.abs(residual).max(axis=-1, keepdims=True)
        error = np.abs(model.residual(tokens, layer) - residual) / scale
        assert error.max() < TOLERANCE, layer
    np.testing.assert_allclose(model.logits(tokens)[0], logits, atol=1e-3, rtol=0)


@pytest.mark.parametrize("case", ["neox", "gpt2", "llama", "qwen3", "gemma3"])
def test_residuals_from_embeddings(case, tmp_path):
    model = load_language_model(save_random(*CASES[case], tmp_path), dtype="float32")
    assert isinstance(model, Traceable)
    for layer in (0, 2):
        ours = model.residual_from(model.embedding[TOKENS], layer)
        np.testing.assert_allclose(ours, model.residual(TOKENS, layer), atol=1e-5)


@pytest.mark.parametrize("case", ["neox", "gpt2", "gemma2"])
def test_logits_and_losses_from_a_residual(case, tmp_path):
    model = load_language_model(save_random(*CASES[case], tmp_path), dtype="float32")
    logits = np.asarray(model.logits(TOKENS)[0], np.float64)
    residual = model.residual(TOKENS, 1)
    np.testing.assert_allclose(model.logits_from(residual, 1), logits, atol=1e-4)
    last = model.residual(TOKENS, 2)
    np.testing.assert_allclose(model.logits_from(last, 2), logits, atol=1e-4)
    ours = model.losses_from([residual, jnp.zeros_like(residual)], 1, TOKENS)
    zeroed = model.logits(TOKENS, layer=1, splices=(jnp.zeros_like,))[0]
    p, q = (log_softmax(x) for x in (logits, np.asarray(zeroed, np.float64)))
    for i, log in enumerate((p, q)):
        expected = -np.take_along_axis(log[:, :-1], TOKENS[:, 1:, None], -1)[..., 0]
        np.testing.assert_allclose(ours.ce[i], expected, atol=1e-4)
    np.testing.assert_allclose(ours.kl[0], 0, atol=1e-6)
    np.testing.assert_allclose(ours.kl[1], (np.exp(p) * (p - q)).sum(-1), atol=1e-4)


@pytest.mark.parametrize("case", ["neox", "gpt2", "llama", "qwen3", "gemma3"])
def test_bfloat16_agrees_with_float32(case, tmp_path):
    folder = save_random(*CASES[case], tmp_path)
    exact = load_language_model(folder, dtype="float32")
    rounded = load_language_model(folder, dtype="bfloat16")
    assert (exact.dtype, rounded.dtype) == ("float32", "bfloat16")
    residual, expected = (m.residual(TOKENS, 2) for m in (rounded, exact))
    assert residual.dtype == jnp.float32
    error = jnp.linalg.norm(residual - expected) / jnp.linalg.norm(expected)
    assert 1e-4 < error < 0.03
    losses = [float(jnp.mean(m.loss(TOKENS)[0])) for m in (rounded, exact)]
    assert losses[0] == pytest.approx(losses[1], rel=0.03)


def test_auto_is_float32_for_a_narrow_model(tmp_path):
    assert load_language_model(save_random("Llama", SIZES, tmp_path)).dtype == "float32"
    with pytest.raises(UserError, match="lm_dtype='float16' must be"):
        load_language_model(str(tmp_path), dtype="float16")  # type: ignore[arg-type]


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


@pytest.mark.parametrize("case", ["gpt2", "llama dynamic scaling"])
def test_a_context_beyond_the_positions_is_refused(case, tmp_path):
    model = load_language_model(save_random(*CASES[case], tmp_path), backend="jax")
    with pytest.raises(UserError, match="65 tokens exceeds the 64 positions"):
        model.residual(np.ones((1, 65), int), 0)


REFUSED = {
    "quantised": ("llama", {"quantization_config": {"bits": 4}}, "quantization_config"),
    "bidirectional": (
        "gemma3",
        {"use_bidirectional_attention": True},
        "use_bidirectional_attention=True",
    ),
    "inverse layers": (
        "gpt2",
        {"scale_attn_by_inverse_layer_idx": True},
        "scale_attn_by_inverse_layer_idx=True",
    ),
    "long rope": ("qwen2", rope("longrope"), "rotary scaling 'longrope'"),
    "chunks": ("qwen3", {"layer_types": ["chunked_attention"] * 3}, "layer_types"),
    "activation": ("llama", {"hidden_act": "mish"}, "hidden_act='mish'"),
    "heads": ("llama", {"num_key_value_heads": 3}, "multiple of num_key_value_heads=3"),
    "too few kinds": (
        "gemma2",
        {"layer_types": ["full_attention"]},
        "layer_types has 1 entries for 3 blocks",
    ),
    "turned in part": ("llama", rope("default", partial_rotary_factor=0.5), "partial"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_run_is_refused_by_name(case, tmp_path):
    name, changes, message = REFUSED[case]
    if case == "chunks":
        changes = changes | {"use_sliding_window": True}
    save_random(*CASES[name], tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(UserError, match=message):
        load_language_model(str(tmp_path), backend="jax")
