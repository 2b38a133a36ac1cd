"""Which language models run in JAX, and what their files call things: one table.

A family says how its config.json becomes a `Spec` and how the tensors in its
safetensors files are named. A setting that changes what a model computes and is not
supported here is refused by name; one that transformers does not know either is
ignored.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from vsae_jax.lm.decoder import ACTIVATIONS, Spec
from vsae_jax.lm.rotary import frequencies, is_dynamic
from vsae_jax.system.errors import UserError

Config = Mapping[str, Any]
USE_TRANSFORMERS = "use --backend=transformers"
# Refused unless absent or as here, in any family.
_PLAIN = {
    "quantization_config": None,
    "add_cross_attention": False,
    "is_encoder_decoder": False,
    "use_bidirectional_attention": False,
    "scale_attn_by_inverse_layer_idx": False,
    "num_experts": None,
    "num_local_experts": None,
}
_SLIDING, _FULL = "sliding_attention", "full_attention"


class Read(NamedTuple):
    """A model's steps, and what differs between its blocks: `window [n_layers]`, how
    many positions a query sees, and `frequencies [n_layers, half]` of its rotations."""

    spec: Spec
    per_layer: dict[str, Float[np.ndarray, "n_layers ..."]]


@dataclass(frozen=True, kw_only=True)
class Family:
    """One row of the table.

    prefix: of every tensor but the unembedding; files of the bare model lack it.
    layers: the prefix of a block's tensors, with `{}` for its number.
    names: our array without its kind (`w_`, `_scale`, ...) -> the file's module; three
      modules are queries, keys and values side by side.
    by_head: one tensor holds queries, keys and values, one head after another.
    transposed: matrices are `[out, in]` in the file, as in torch's Linear.
    norm_offset: what has to be added to a norm's scale in the file.
    plain: settings that must be absent or have this value, besides those of any family.
    """

    model_type: str
    read: Callable[[Config], Read]
    names: Mapping[str, str | tuple[str, str, str]]
    prefix: str = "model."
    layers: str = "model.layers.{}."
    by_head: bool = False
    transposed: bool = True
    norm_offset: float = 0.0
    plain: Mapping[str, Any] = field(default_factory=dict)


def family_of(config: Config) -> Family | None:
    """The row for a config.json, None where there is none."""
    architectures = config.get("architectures") or [None]
    for architecture, family in FAMILIES.items():
        is_it = architectures[0] in (None, architecture)
        if is_it and config.get("model_type") == family.model_type:
            return family
    return None


def read_spec(family: Family, config: Config) -> Read:
    """The model's steps; a setting that is not supported here raises a UserError.

    Where the family has no windows, a query sees everything before it.
    """
    for name, plain in (_PLAIN | dict(family.plain)).items():
        if config.get(name, plain) not in (plain, None):
            raise UserError(
                f"--backend=jax does not run {name}={str(config[name])[:60]} of this "
                f"config.json; {USE_TRANSFORMERS}"
            )
    read = family.read(config)
    activation = read.spec.activation
    if activation not in ACTIVATIONS:
        raise UserError(
            f"--backend=jax does not know hidden_act={activation!r}, only "
            f"{', '.join(ACTIVATIONS)}; {USE_TRANSFORMERS}"
        )
    window = _everywhere(np.inf, read.spec.n_layers)
    return Read(read.spec, {"window": window} | read.per_layer)


def _sizes(config: Config, *more: str, **names: str) -> dict[str, Any]:
    """The sizes that every decoder has; `names` are a family's own names for them, and
    `more` the other keys that it needs."""
    keys = {
        "vocab_size": "vocab_size",
        "d_model": "hidden_size",
        "n_layers": "num_hidden_layers",
        "n_heads": "num_attention_heads",
        "d_mlp": "intermediate_size",
    } | names
    if absent := [key for key in (*keys.values(), *more) if key not in config]:
        raise UserError(f"config.json lacks {', '.join(absent)}; restore the original")
    sizes = {ours: config[theirs] for ours, theirs in keys.items()}
    d_model, n_heads = sizes["d_model"], sizes["n_heads"]
    d_head, n_kv = config.get("head_dim"), config.get("num_key_value_heads")
    if d_head is None and d_model % n_heads:
        raise UserError(
            f"config.json: {keys['d_model']}={d_model} must be a multiple of "
            f"{keys['n_heads']}={n_heads}"
        )
    if n_kv and n_heads % n_kv:
        raise UserError(
            f"config.json: {keys['n_heads']}={n_heads} must be a multiple of "
            f"num_key_value_heads={n_kv}"
        )
    return sizes | {
        "d_head": d_head or d_model // n_heads,
        "n_kv_heads": n_kv or n_heads,
    }


def _rotations(
    config: Config, settings: Config, *, ndims: int, base: float
) -> tuple[Float[np.ndarray, " half"], float]:
    positions = config["max_position_embeddings"]
    return frequencies(settings, base=base, ndims=ndims, max_positions=positions)


def _longest(config: Config, settings: Config) -> int | None:
    """The longest context: with dynamic scaling the frequencies are right only up to
    the positions that the model was trained on. None for any."""
    return config["max_position_embeddings"] if is_dynamic(settings) else None


def _everywhere(values: Any, n_layers: int) -> Float[np.ndarray, "n_layers ..."]:
    values = np.asarray(values, np.float32)
    return np.broadcast_to(values, (n_layers, *values.shape))


def _read_neox(config: Config) -> Read:
    sizes = _sizes(config, "max_position_embeddings")
    settings = config.get("rope_parameters") or config.get("rope_scaling") or {}
    share = settings.get("partial_rotary_factor", config.get("rotary_pct", 0.25))
    turns, scale = _rotations(
        config,
        settings,
        ndims=int(sizes["d_head"] * share),
        base=config.get("rotary_emb_base", 10000.0),
    )
    bias = config.get("attention_bias", True)
    spec = Spec(
        **sizes,
        norm="layer",
        norm_eps=config.get("layer_norm_eps", 1e-5),
        activation=config.get("hidden_act", "gelu"),
        attention_scale=sizes["d_head"] ** -0.5,
        parallel=config.get("use_parallel_residual", True),
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=True,
        tied=config.get("tie_word_embeddings", False),
        rotary_scale=scale,
        max_time=_longest(config, settings),
    )
    return Read(spec, {"frequencies": _everywhere(turns, spec.n_layers)})


def _read_gpt2(config: Config) -> Read:
    names = {"d_model": "n_embd", "n_layers": "n_layer", "n_heads": "n_head"}
    inner = config.get("n_inner") or 4 * config.get("n_embd", 0)
    sizes = _sizes(
        {**config, "n_inner": inner}, "n_positions", **names, d_mlp="n_inner"
    )
    scaled = config.get("scale_attn_weights", True)
    spec = Spec(
        **sizes,
        norm="layer",
        norm_eps=config.get("layer_norm_epsilon", 1e-5),
        activation=config.get("activation_function", "gelu_new"),
        attention_scale=sizes["d_head"] ** -0.5 if scaled else 1.0,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        tied=config.get("tie_word_embeddings", True),
        learned_positions=True,
        max_time=config["n_positions"],
    )
    return Read(spec, {})


def _read_llama(config: Config, **own: Any) -> Read:
    """The steps of Llama, or of a family that differs from it by `own`."""
    sizes = _sizes(config, "max_position_embeddings")
    settings = config.get("rope_parameters") or config.get("rope_scaling") or {}
    share = settings.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if share not in (None, 1.0):
        raise UserError(
            f"--backend=jax does not run partial_rotary_factor={share!r} of this "
            f"family; {USE_TRANSFORMERS}"
        )
    ndims, base = sizes["d_head"], config.get("rope_theta", 10000.0)
    turns, scale = _rotations(config, settings, ndims=ndims, base=base)
    bias = config.get("attention_bias", False)
    choices: dict[str, Any] = {
        "norm": "rms",
        "norm_eps": config.get("rms_norm_eps", 1e-6),
        "activation": config.get("hidden_act", "silu"),
        "attention_scale": sizes["d_head"] ** -0.5,
        "gated": True,
        "qkv_bias": bias,
        "out_bias": bias,
        "tied": config.get("tie_word_embeddings", False),
        "rotary_scale": scale,
        "max_time": _longest(config, settings),
    }
    spec = Spec(**sizes, **(choices | own))
    return Read(spec, {"frequencies": _everywhere(turns, spec.n_layers)})


def _read_mistral(config: Config) -> Read:
    read = _read_llama(config, qkv_bias=False, out_bias=False)
    window = config.get("sliding_window", 4096)
    return _with_windows(read, [window] * read.spec.n_layers)


def _read_qwen2(config: Config) -> Read:
    read = _read_llama(config, qkv_bias=True, out_bias=False)
    return _with_windows(read, _qwen_windows(config, read.spec.n_layers))


def _read_qwen3(config: Config) -> Read:
    read = _read_llama({"head_dim": 128, **config}, qk_norm=True)
    return _with_windows(read, _qwen_windows(config, read.spec.n_layers))


def _qwen_windows(config: Config, n_layers: int) -> list[int | None]:
    if not config.get("use_sliding_window", False):
        return [None] * n_layers
    first = config.get("max_window_layers", 28)
    kinds = [_SLIDING if i >= first else _FULL for i in range(n_layers)]
    return _windows(config, kinds)


def _windows(config: Config, kinds: list[str]) -> list[int | None]:
    """Each block's window; `kinds` where config.json does not list them itself."""
    kinds = config.get("layer_types") or kinds
    if unknown := sorted(set(kinds) - {_SLIDING, _FULL}):
        raise UserError(
            f"--backend=jax does not run layer_types of {unknown[0]!r}; "
            f"{USE_TRANSFORMERS}"
        )
    window = config.get("sliding_window", 4096)
    return [window if kind == _SLIDING else None for kind in kinds]


def _with_windows(read: Read, windows: list[int | None]) -> Read:
    if len(windows) != read.spec.n_layers:
        raise UserError(
            f"config.json: layer_types has {len(windows)} entries for "
            f"{read.spec.n_layers} blocks; restore the original"
        )
    finite = [np.inf if window is None else window for window in windows]
    return Read(read.spec, read.per_layer | {"window": np.array(finite, np.float32)})


def _read_gemma(config: Config, **own: Any) -> Read:
    """The steps that Gemma 2 and 3 have in common."""
    sizes = _sizes(config, "head_dim", "num_key_value_heads")
    choices: dict[str, Any] = {
        "activation": config.get("hidden_activation") or "gelu_pytorch_tanh",
        "attention_scale": config.get("query_pre_attn_scalar", 256) ** -0.5,
        "post_norms": True,
        "tied": config.get("tie_word_embeddings", True),
        "embed_scale": sizes["d_model"] ** 0.5,
    }
    return _read_llama(config, **(choices | own))


def _read_gemma2(config: Config) -> Read:
    read = _read_gemma(
        config,
        attention_cap=config.get("attn_logit_softcapping", 50.0),
        logit_cap=config.get("final_logit_softcapping", 30.0),
    )
    kinds = [_FULL if i % 2 else _SLIDING for i in range(read.spec.n_layers)]
    return _with_windows(read, _windows(config, kinds))


def _read_gemma3(config: Config) -> Read:
    """Gemma 3, where blocks with a window have rotations of their own."""
    nested = config.get("rope_parameters") or {}
    settings = {
        _SLIDING: nested.get(_SLIDING) or {},
        _FULL: nested.get(_FULL) or config.get("rope_scaling") or {},
    }
    bases = {
        _SLIDING: config.get("rope_local_base_freq", 10_000.0),
        _FULL: config.get("rope_theta", 1_000_000.0),
    }
    flat = {**config, "rope_parameters": {}, "rope_scaling": {}}
    cap = config.get("final_logit_softcapping")
    read = _read_gemma(flat, qk_norm=True, logit_cap=cap)
    period = config.get("sliding_window_pattern", 6)
    kinds = [
        _FULL if (i + 1) % period == 0 else _SLIDING for i in range(read.spec.n_layers)
    ]
    read = _with_windows(read, _windows(config, kinds))
    turns = {}
    for kind in settings:
        ndims, own = read.spec.d_head, settings[kind]
        turns[kind], scale = _rotations(config, own, ndims=ndims, base=bases[kind])
        if scale != 1 or is_dynamic(settings[kind]):
            raise UserError(
                f"--backend=jax does not run this rotary scaling of {kind} in Gemma 3; "
                f"{USE_TRANSFORMERS}"
            )
    each = [turns[kind] for kind in config.get("layer_types") or kinds]
    return Read(read.spec, read.per_layer | {"frequencies": np.stack(each)})


_LLAMA = {
    "embed": "model.embed_tokens",
    "ln": "model.norm",
    "unembed": "lm_head",
    "ln1": "input_layernorm",
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
    "out": "self_attn.o_proj",
    "ln2": "post_attention_layernorm",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
_GEMMA = _LLAMA | {
    "post1": "post_attention_layernorm",
    "ln2": "pre_feedforward_layernorm",
    "post2": "post_feedforward_layernorm",
}
_NEOX = {
    "embed": "gpt_neox.embed_in",
    "ln": "gpt_neox.final_layer_norm",
    "unembed": "embed_out",
    "ln1": "input_layernorm",
    "qkv": "attention.query_key_value",
    "out": "attention.dense",
    "ln2": "post_attention_layernorm",
    "up": "mlp.dense_h_to_4h",
    "down": "mlp.dense_4h_to_h",
}
_GPT2 = {
    "embed": "transformer.wte",
    "positions": "transformer.wpe",
    "ln": "transformer.ln_f",
    "unembed": "lm_head",
    "ln1": "ln_1",
    "qkv": "attn.c_attn",
    "out": "attn.c_proj",
    "ln2": "ln_2",
    "up": "mlp.c_fc",
    "down": "mlp.c_proj",
}

FAMILIES = {
    "GPTNeoXForCausalLM": Family(
        model_type="gpt_neox",
        read=_read_neox,
        names=_NEOX,
        prefix="gpt_neox.",
        layers="gpt_neox.layers.{}.",
        by_head=True,
    ),
    "GPT2LMHeadModel": Family(
        model_type="gpt2",
        read=_read_gpt2,
        names=_GPT2,
        prefix="transformer.",
        layers="transformer.h.{}.",
        transposed=False,
    ),
    "LlamaForCausalLM": Family(
        model_type="llama",
        read=lambda config: _read_llama(config, mlp_bias=config.get("mlp_bias", False)),
        names=_LLAMA,
    ),
    "MistralForCausalLM": Family(
        model_type="mistral", read=_read_mistral, names=_LLAMA
    ),
    "Qwen2ForCausalLM": Family(model_type="qwen2", read=_read_qwen2, names=_LLAMA),
    "Qwen3ForCausalLM": Family(model_type="qwen3", read=_read_qwen3, names=_LLAMA),
    "Gemma2ForCausalLM": Family(
        model_type="gemma2", read=_read_gemma2, names=_GEMMA, norm_offset=1.0
    ),
    "Gemma3ForCausalLM": Family(
        model_type="gemma3_text",
        read=_read_gemma3,
        names=_GEMMA,
        norm_offset=1.0,
        plain={"attn_logit_softcapping": None},
    ),
}
