"""A random GPT-NeoX with a real tokenizer and a corpus for it, made in no time.

No torch and no network: `make_tiny_neox` writes what `load_language_model` reads.
"""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

EOT = "<|endoftext|>"
_WORDS = (
    "the a little big old red dog cat bird girl boy tree house sun day was saw had "
    "went ran said to in on and but then very happy sad Once One There They Tom Lily"
).split()


def make_stories(n: int, *, seed: int = 0) -> list[str]:
    """`n` documents of two to five sentences of random words."""
    rng = np.random.default_rng(seed)

    def sentence() -> str:
        return " ".join(rng.choice(_WORDS, rng.integers(4, 12))) + "."

    return [" ".join(sentence() for _ in range(rng.integers(2, 6))) for _ in range(n)]


def write_jsonl(path: Path, texts: list[str]) -> Path:
    """One `{"text": ...}` object a line."""
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def make_tiny_neox(
    folder: Path,
    *,
    n_layers: int = 2,
    d_model: int = 16,
    vocab_size: int = 320,
    seed: int = 0,
) -> Path:
    """Writes config.json, model.safetensors and the tokenizer's files to `folder`.

    The tokenizer is a byte-level BPE whose id 0 is `<|endoftext|>`, BOS and EOS in
    one, as Pythia's; it has at most `vocab_size` ids, of which 257 are needed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "model_type": "gpt_neox",
        "architectures": ["GPTNeoXForCausalLM"],
        "vocab_size": vocab_size,
        "hidden_size": d_model,
        "num_hidden_layers": n_layers,
        "num_attention_heads": 2,
        "intermediate_size": 4 * d_model,
        "max_position_embeddings": 256,
        "rotary_pct": 0.25,
        "rotary_emb_base": 10000,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-5,
        "use_parallel_residual": True,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    weights = _weights(n_layers, d_model, vocab_size, np.random.default_rng(seed))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    make_tokenizer(vocab_size).save_pretrained(folder)
    return folder


def make_tokenizer(vocab_size: int = 320) -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on `make_stories`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(make_stories(50), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=EOT, eos_token=EOT, unk_token=EOT
    )


def _weights(
    n_layers: int, d_model: int, vocab_size: int, rng: np.random.Generator
) -> dict[str, np.ndarray]:
    def normal(*shape: int, std: float = 0.2) -> np.ndarray:
        return (std * rng.standard_normal(shape)).astype(np.float32)

    def linear(name: str, n_out: int, n_in: int) -> dict[str, np.ndarray]:
        return {f"{name}.weight": normal(n_out, n_in), f"{name}.bias": normal(n_out)}

    def norm(name: str) -> dict[str, np.ndarray]:
        scale = 1 + normal(d_model)
        return {f"{name}.weight": scale, f"{name}.bias": normal(d_model)}

    weights = {
        "gpt_neox.embed_in.weight": normal(vocab_size, d_model, std=1.0),
        "embed_out.weight": normal(vocab_size, d_model),
        **norm("gpt_neox.final_layer_norm"),
    }
    for i in range(n_layers):
        block = f"gpt_neox.layers.{i}"
        weights |= norm(f"{block}.input_layernorm")
        weights |= norm(f"{block}.post_attention_layernorm")
        weights |= linear(f"{block}.attention.query_key_value", 3 * d_model, d_model)
        weights |= linear(f"{block}.attention.dense", d_model, d_model)
        weights |= linear(f"{block}.mlp.dense_h_to_4h", 4 * d_model, d_model)
        weights |= linear(f"{block}.mlp.dense_4h_to_h", d_model, 4 * d_model)
    return weights
