"""Tokens a second through a language model up to a block: both backends, both dtypes.

    python benchmarks/language_models.py --model=FOLDER --layer=14

Each round times every way once, in turn, so that what else the machine does meets all
alike; medians over the rounds. Agreement is with the JAX backend in float32: of
residuals the largest relative error of a row, and the mean loss over the same tokens.
"""

import argparse
import itertools
import time

import jax
import numpy as np

from vsae_jax.lm import LanguageModel, load_language_model

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
    exact = np.asarray(models[WAYS[0]].residual(tokens, args.layer))
    print(f"{args.batch} x {args.length} tokens, up to block {args.layer}")
    for way, model in models.items():
        median = float(np.median(taken[way]))
        rate = tokens.size / median
        rows = np.asarray(model.residual(tokens, args.layer))
        error = np.linalg.norm(rows - exact, axis=-1) / np.linalg.norm(exact, axis=-1)
        loss = float(np.mean(model.loss(tokens[:2])[0]))
        print(
            f"{way[0]:>12} {way[1]:>8}: {rate:8.0f} tokens/s, best "
            f"{tokens.size / min(taken[way]):8.0f}; row error median "
            f"{np.median(error):.1e} largest {error.max():.1e}; loss {loss:.5f}"
        )


def seconds(model: LanguageModel, tokens: np.ndarray, layer: int) -> float:
    """Of one pass up to the block."""
    start = time.perf_counter()
    jax.block_until_ready(model.residual(tokens, layer))
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
