"""Makes the bundled small language model again: tokenizer, weights, sampled stories.

Claim:    1.3 M parameters and 15 M tokens of TinyStories are enough for a model that
          writes grammatical stories, so the demo has real activations to work on.
Command:  python -m experiments.make_small_lm --dataset=tinystories.jsonl --out=DIR
Expected: the tokenizer bit for bit, and 15 M tokens in 1,832 steps: about 19 minutes on
          2 idle cores (estimated: 1.6 steps a second over the first 100), then a few to
          sample. The bundled model has a validation loss of 2.29 nats a token; this
          recipe was watched to a training loss of 2.87 at step 474, not to its end.
"""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from vsae_jax.config import cli
from vsae_jax.config.fields import flag
from vsae_jax.system.errors import UserError, missing_extra

END = "<|endoftext|>"


@dataclass(frozen=True)
class SmallLMConfig:
    """Trains a small GPT-NeoX from scratch on a .jsonl of stories, and samples stories
    from it. The folder loads with transformers and with vsae_jax."""

    dataset: str = flag('.jsonl of stories, {"text": ...} a line', "")
    out: str = flag("folder for the model; new or empty", "")
    steps: int = flag("optimizer steps", 1832)
    batch_size: int = flag("contexts in a step", 32)
    context_length: int = flag("tokens in a context, and most tokens of a story", 256)
    lr: float = flag("peak learning rate; warm-up over 5 %, cosine to 10 % of it", 2e-3)
    stories: int = flag("stories to sample", 2150)
    temperature: float = flag("of the sampled stories", 0.8)
    seed: int = flag("of the weights, the batches and the stories", 0)

    def __post_init__(self):
        if not self.dataset or not self.out:
            raise UserError("--dataset and --out must be set")
        for name in ("steps", "batch_size", "stories", "lr", "temperature"):
            if getattr(self, name) <= 0:
                raise UserError(f"--{name}={getattr(self, name)} must be above 0")
        if not 2 <= self.context_length <= 512:
            raise UserError(
                f"--context_length={self.context_length} must lie between 2 and 512"
            )


def make(configs: Sequence[SmallLMConfig]) -> None:
    """Trains, saves and samples; the stories come from the weights as saved."""
    (config,) = configs
    try:
        import torch
    except ImportError:
        raise missing_extra("torch", extra="torch") from None
    out = Path(config.out)
    if out.exists() and any(out.iterdir()):
        raise UserError(f"--out={config.out} is not empty; name a new folder")
    out.mkdir(parents=True, exist_ok=True)
    texts = read_stories(config.dataset)
    torch.manual_seed(config.seed)
    tokenizer = train_tokenizer(texts)
    model = new_model()
    train_rows, held_out = token_rows(tokenizer, texts, config)
    train(model, train_rows, config)
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    model.float().eval()
    print(f"validation loss {loss_per_token(model, held_out):.3f} nats a token")
    with open(out / "sampled_stories.jsonl", "w", encoding="utf-8") as file:
        for text in sample_stories(model, tokenizer, config):
            file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
    print(f"wrote {out}")


def read_stories(path: str) -> list[str]:
    """The texts of a .jsonl, in order."""
    texts = []
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                texts.append(json.loads(line)["text"])
            except (ValueError, KeyError, TypeError):
                raise UserError(
                    f'--dataset={path} line {number} is not {{"text": ...}}'
                ) from None
    return texts


def train_tokenizer(texts: list[str]) -> Any:
    """Byte-level BPE with 2,048 tokens; token 0 ends a story and starts the next."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2048,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        pad_token=END,
        unk_token=END,
    )


def new_model() -> Any:
    """GPT-NeoX with random weights: Pythia's architecture, 1.3 M parameters."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    config = GPTNeoXConfig(
        vocab_size=2048,
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=512,
        max_position_embeddings=512,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.25,
        },
        use_parallel_residual=True,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPTNeoXForCausalLM(config)


def token_rows(
    tokenizer: Any, texts: list[str], config: SmallLMConfig
) -> tuple[np.ndarray, np.ndarray]:
    """Contexts `[n, context_length]` of the packed stories: 98 % to train on, and the
    rest. Every story starts with token 0."""
    stories = tokenizer(texts)["input_ids"]
    stream = np.concatenate([np.array([0, *ids], np.int64) for ids in stories])
    rows = stream.size // config.context_length
    n_held_out = max(rows // 50, 1)
    if rows <= n_held_out:
        raise UserError(
            f"--dataset={config.dataset} has {stream.size} tokens, less than two "
            f"contexts of --context_length={config.context_length}"
        )
    kept = stream[: rows * config.context_length].reshape(rows, -1)
    return kept[:-n_held_out], kept[-n_held_out:]


def train(model: Any, rows: np.ndarray, config: SmallLMConfig) -> None:
    """AdamW with warm-up and cosine decay on `config.steps` batches."""
    import torch

    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.lr, betas=(0.9, 0.95), weight_decay=0.1
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: lr_share(step, steps=config.steps)
    )
    model.train()
    progress = tqdm(batches(rows, config), total=config.steps, unit="step")
    for batch in progress:
        tokens = torch.from_numpy(batch)
        loss = model(input_ids=tokens, labels=tokens).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        progress.set_postfix(loss=f"{loss.item():.3f}", refresh=False)


def lr_share(step: int, *, steps: int) -> float:
    """Learning rate as a share of its peak: linear over 5 %, cosine down to 0.1."""
    warmup = max(steps // 20, 1)
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(steps - warmup, 1)
    return 0.1 + 0.9 * (1 + math.cos(math.pi * min(done, 1.0))) / 2


def batches(rows: np.ndarray, config: SmallLMConfig) -> Iterator[np.ndarray]:
    """`config.steps` batches; every row once an epoch, in a seeded order."""
    rng = np.random.default_rng(config.seed)
    order = np.empty(0, np.int64)
    for _ in range(config.steps):
        while order.size < config.batch_size:
            order = np.concatenate([order, rng.permutation(len(rows))])
        yield rows[order[: config.batch_size]]
        order = order[config.batch_size :]


def loss_per_token(model: Any, rows: np.ndarray) -> float:
    """Mean next-token loss in float32, in nats."""
    import torch

    total = 0.0
    with torch.no_grad():
        for row in rows:
            tokens = torch.from_numpy(row[None])
            total += model(input_ids=tokens, labels=tokens).loss.item()
    return total / len(rows)


def sample_stories(model: Any, tokenizer: Any, config: SmallLMConfig) -> Iterator[str]:
    """Up to `config.stories` stories that end within a context, each once."""
    import torch

    seen = set()
    batch = min(config.stories, 128)
    for _ in tqdm(range(math.ceil(config.stories / batch)), unit="batch"):
        tokens = model.generate(
            torch.zeros((batch, 1), dtype=torch.int64),
            attention_mask=torch.ones((batch, 1), dtype=torch.int64),
            do_sample=True,
            temperature=config.temperature,
            top_k=0,
            max_new_tokens=config.context_length - 1,
            pad_token_id=0,
        )
        for row in tokens[:, 1:].tolist():
            text = tokenizer.decode(row[: row.index(0)]) if 0 in row else ""
            if text and text not in seen and len(seen) < config.stories:
                seen.add(text)
                yield text


if __name__ == "__main__":
    cli.main(make, SmallLMConfig)
