"""Tokens a second through a language model up to a block: both backends, both dtypes.

    python benchmarks/language_models.py --model=FOLDER --layer=14

Each round times every way once, in turn, so that what else the machine does meets all
alike; medians over the rounds. Agreement is with the JAX backend in float32: of
residuals the largest relative error of a row, and the mean loss over the same tokens.
Operations a second are those of the blocks' matrices alone, beside what a product of
the MLP's shape reaches by itself, in both libraries.
"""

import argparse
import itertools
import time

import jax
import jax.numpy as jnp
import numpy as np
import torch

from vsae_jax.lm import LanguageModel, load_language_model
from vsae_jax.lm.jax_backend import Decoder

WAYS = list(itertools.product(("jax", "transformers"), ("float32", "bfloat16")))


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--layer", type=int, default=14)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    models = {
        way: load_language_model(args.model, backend=way[0], dtype=way[1])
        for way in WAYS
    }
    rng = np.random.default_rng(0)
    vocabulary = models[WAYS[0]].vocab_size
    tokens = rng.integers(3, vocabulary, size=(args.batch, args.length))
    for model in models.values():
        seconds(model, tokens, args.layer)
    taken: dict[tuple[str, str], list[float]] = {way: [] for way in WAYS}
    for _ in range(args.rounds):
        for way, model in models.items():
            taken[way].append(seconds(model, tokens, args.layer))
    first = models[WAYS[0]]
    exact = np.asarray(first.residual(tokens, args.layer))
    print(f"{args.batch} x {args.length} tokens, up to block {args.layer}")
    assert isinstance(first, Decoder)
    blocks = first.params["blocks"]
    weights = sum(w[0].size for name, w in blocks.items() if name.startswith("w_"))
    operations = 2 * weights * (args.layer + 1)
    _, d_model, d_mlp = blocks["w_up"].shape
    for library, rate in product_rates(tokens.size, d_model, d_mlp).items():
        print(f"{library} alone, bfloat16: {rate / 1e9:.0f} GFLOP/s")
    for way, model in models.items():
        median = float(np.median(taken[way]))
        rate = tokens.size / median
        rows = np.asarray(model.residual(tokens, args.layer))
        error = np.linalg.norm(rows - exact, axis=-1) / np.linalg.norm(exact, axis=-1)
        loss = float(np.mean(model.loss(tokens[:2])[0]))
        print(
            f"{way[0]:>12} {way[1]:>8}: {rate:8.0f} tokens/s, best "
            f"{tokens.size / min(taken[way]):8.0f}, {rate * operations / 1e9:5.0f} "
            "GFLOP/s; row error median "
            f"{np.median(error):.1e} largest {error.max():.1e}; loss {loss:.5f}"
        )


def product_rates(rows: int, d_model: int, d_mlp: int) -> dict[str, float]:
    """Operations a second of a bfloat16 product, the median of fifty."""
    x, w = np.ones((rows, d_model), np.float32), np.ones((d_model, d_mlp), np.float32)
    ours = jax.jit(lambda x, w: jnp.matmul(x, w, preferred_element_type=jnp.float32))
    by_jax = [jnp.asarray(a, jnp.bfloat16) for a in (x, w)]
    by_torch = [torch.from_numpy(a).bfloat16() for a in (x, w)]
    ways = {
        "jax": lambda: jax.block_until_ready(ours(*by_jax)),
        "torch": lambda: torch.matmul(*by_torch),
    }
    rates = {}
    for library, product in ways.items():
        taken = []
        for _ in range(53):
            start = time.perf_counter()
            product()
            taken.append(time.perf_counter() - start)
        rates[library] = 2 * x.size * d_mlp / float(np.median(taken[3:]))
    return rates


def seconds(model: LanguageModel, tokens: np.ndarray, layer: int) -> float:
    """Of one pass up to the block."""
    start = time.perf_counter()
    jax.block_until_ready(model.residual(tokens, layer))
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
