"""Every family in JAX: each residual and the logits equal transformers', in float32."""

import json
import os
import re

import jax.numpy as jnp
import numpy as np
import pytest
from test_lm_decoder import neox_stories

from vsae_jax.config import Hook
from vsae_jax.lm import Traceable, identity, load_language_model
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


# What a block adds to the stream, by transformers' names: attention's, the MLP's.
PLAIN = {"GPTNeoX": ("attention", "mlp"), "GPT2": ("attn", "mlp")}
NORMED = ("post_attention_layernorm", "post_feedforward_layernorm")
ADDED = PLAIN | {"Gemma2": NORMED, "Gemma3Text": NORMED}


def adding(block) -> dict:
    """The modules whose outputs a block of transformers adds to the stream."""
    family = re.sub("(DecoderLayer|Layer|Block)$", "", type(block).__name__)
    family = {"Gemma3": "Gemma3Text"}.get(family, family)
    names = ADDED.get(family, ("self_attn", "mlp"))
    return {
        site: getattr(block, name)
        for site, name in zip(("attn_out", "mlp_out"), names, strict=True)
    }


def reference(folder: str, tokens, replaced=None):
    """transformers' own logits and what is at every hook, by hooks that this test sets;
    `replaced` is a hook and what is there instead."""
    torch = pytest.importorskip("torch", reason="parity needs torch")
    from transformers import AutoModelForCausalLM

    # Its fast attention knows no soft caps.
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    found = {}

    def watch(module, hook):
        def keep(module, args, output):
            if replaced is not None and hook == replaced[0]:
                new = torch.as_tensor(np.array(replaced[1]))
                output = (new, *output[1:]) if isinstance(output, tuple) else new
            stream = output[0] if isinstance(output, tuple) else output
            found[hook] = stream.numpy()
            return output

        module.register_forward_hook(keep)

    inner = model.base_model
    for layer, block in enumerate(inner.h if hasattr(inner, "h") else inner.layers):
        for site, module in {"resid_post": block, **adding(block)}.items():
            watch(module, Hook(layer, site))
    with torch.no_grad():
        logits = model(torch.as_tensor(tokens)).logits.numpy()
    return logits, found


def assert_equal_to_transformers(folder: str, tokens):
    model = load_language_model(folder, backend="jax", dtype="float32")
    logits, expected = reference(folder, tokens)
    assert len(expected) == 3 * model.n_layers
    for layer in range(model.n_layers):
        stream, hook = model.residual(tokens, layer), Hook(layer)
        assert stream.dtype == jnp.float32
        np.testing.assert_allclose(
            stream, expected[hook], atol=TOLERANCE, rtol=0, err_msg=hook.name
        )
    for hook, ours in zip(expected, model.at(tokens, list(expected)), strict=True):
        np.testing.assert_allclose(
            ours, expected[hook], atol=TOLERANCE, rtol=0, err_msg=hook.name
        )
    np.testing.assert_allclose(model.logits(tokens)[0], logits, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("case", CASES)
def test_logits_and_every_hook_equal_transformers(case, tmp_path):
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
    logits, expected = reference(folder, tokens)
    # A row's first position has entries in the thousands.
    for hook, ours in zip(expected, model.at(tokens, list(expected)), strict=True):
        scale = np.abs(expected[hook]).max(axis=-1, keepdims=True)
        assert (np.abs(ours - expected[hook]) / scale).max() < TOLERANCE, hook.name
    np.testing.assert_allclose(model.logits(tokens)[0], logits, atol=1e-3, rtol=0)


@pytest.mark.parametrize("case", ["neox", "gpt2", "llama", "qwen3", "gemma3"])
def test_residuals_from_embeddings(case, tmp_path):
    model = load_language_model(save_random(*CASES[case], tmp_path), dtype="float32")
    assert isinstance(model, Traceable)
    for layer in (0, 2):
        (ours,) = model.at_from(model.embedding[TOKENS], [Hook(layer)])
        np.testing.assert_allclose(ours, model.residual(TOKENS, layer), atol=1e-5)


ONE_A_FAMILY = ["neox", "neox serial", "gpt2", "llama", "mistral", "qwen2", "qwen3"]
ONE_A_FAMILY += ["gemma2", "gemma3"]


@pytest.mark.parametrize("case", ONE_A_FAMILY)
def test_splices_at_every_site_are_transformers_with_hooks(case, tmp_path):
    folder = save_random(*CASES[case], tmp_path)
    models = [
        load_language_model(folder, backend=backend, dtype="float32")
        for backend in ("jax", "transformers")
    ]
    hooks = [Hook(layer, site) for layer in (0, 1) for site in ("attn_out", "mlp_out")]
    values = [model.at(TOKENS, hooks) for model in models]
    for i, hook in enumerate(hooks):
        half = np.array(values[1][i]) / 2
        expected, _ = reference(folder, TOKENS, replaced=(hook, half))
        for model, own in zip(models, values, strict=True):
            np.testing.assert_allclose(own[i], values[1][i], atol=TOLERANCE, rtol=0)
            clean, changed = model.logits(
                TOKENS, layer=hook.layer, site=hook.site, splices=(identity, halved)
            )
            what = f"{hook.name} in {type(model).__name__}"
            np.testing.assert_allclose(
                changed, expected, atol=TOLERANCE, rtol=0, err_msg=what
            )
            np.testing.assert_allclose(clean, model.logits(TOKENS)[0], atol=TOLERANCE)
            assert np.abs(changed - clean).max() > 0.01, what


def halved(x):
    return x / 2


@pytest.mark.parametrize("parallel", [True, False])
def test_the_mlp_sees_a_spliced_attention_only_in_a_serial_block(parallel, tmp_path):
    settings = NEOX | {"use_parallel_residual": parallel}
    model = load_language_model(save_random("GPTNeoX", settings, tmp_path))
    stream, attn_out, mlp_out = model.at(
        TOKENS, [Hook(1), Hook(1, "attn_out"), Hook(1, "mlp_out")]
    )
    cut = model.cut(TOKENS, Hook(1, "attn_out"))
    np.testing.assert_allclose(cut.value, attn_out, atol=1e-6)
    (without,) = model.joined(cut, [np.zeros_like(attn_out)])
    rise = np.abs(without - (stream - attn_out)).max()
    assert rise < 1e-5 if parallel else rise > 0.1
    cut = model.cut(TOKENS, Hook(1, "mlp_out"))
    (without,) = model.joined(cut, [np.zeros_like(mlp_out)])
    np.testing.assert_allclose(without, stream - mlp_out, atol=1e-5)


FOREIGN = {
    "OPT": SIZES | {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "Granite": SIZES | {"residual_multiplier": 0.5},
}


@pytest.mark.parametrize("family", FOREIGN)
def test_a_site_that_a_block_does_not_add_as_it_is_is_refused(family, tmp_path):
    """OPT keeps its MLP under no name; Granite multiplies what it adds."""
    model = load_language_model(save_random(family, FOREIGN[family], tmp_path))
    model.check(Hook(2))
    for site in ("attn_out", "mlp_out"):
        with pytest.raises(UserError, match=f"--site={site}.*{family}DecoderLayer"):
            model.check(Hook(1, site))
    with pytest.raises(UserError, match="take --site=resid_post"):
        model.at(TOKENS, [Hook(0), Hook(1, "mlp_out")])


@pytest.mark.parametrize("backend", ["jax", "transformers"])
def test_bfloat16_has_its_sites(backend, tmp_path):
    folder = save_random(*CASES["gemma2"], tmp_path)
    hooks = [Hook(layer, site) for layer in (0, 2) for site in ("attn_out", "mlp_out")]
    exact = load_language_model(folder, dtype="float32").at(TOKENS, hooks)
    model = load_language_model(folder, backend=backend, dtype="bfloat16")
    for rounded, expected in zip(model.at(TOKENS, hooks), exact, strict=True):
        assert rounded.dtype == np.float32
        error = np.linalg.norm(rounded - expected) / np.linalg.norm(expected)
        assert 1e-4 < error < 0.05


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
