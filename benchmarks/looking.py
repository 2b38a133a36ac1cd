"""The feature pass against the language model's own forward pass, and its memory.

    python -m benchmarks.looking --run=RUN [--num_tokens=100000]
    python -m benchmarks.looking --d_sae=8192 --k=64 --num_tokens=1000000

With --run: both on the same held-out tokens, each once on a few contexts before it is
timed. Goal: under 2 times. With --d_sae: random rows of d_model 64 through a random
TopK autoencoder, with the process's resident memory as the tokens go by; it must level
off below 4 GB.
"""

import argparse
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from vsae_jax.autoencoder import sae
from vsae_jax.autoencoder.reader import Reader
from vsae_jax.config import EvalConfig, SAEConfig
from vsae_jax.latents.feature_tables import encode_counted, open_source, pass_over
from vsae_jax.latents.firings import FeaturePass, Limits

_D_MODEL, _ROWS = 64, 127


def main() -> None:
    """One of the two measurements."""
    flags = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    flags.add_argument("--run", default="")
    flags.add_argument("--num_tokens", type=int, default=100_000)
    flags.add_argument("--d_sae", type=int, default=8192)
    flags.add_argument("--k", type=int, default=64)
    a = flags.parse_args()
    if a.run:
        against_the_forward_pass(a.run, a.num_tokens)
    else:
        memory(a.d_sae, a.k, a.num_tokens)


def against_the_forward_pass(run: str, num_tokens: int) -> None:
    """Seconds of each on the same contexts."""
    source = open_source(Path(run), EvalConfig(run=run, num_tokens=num_tokens))
    tokens = source.activations.tokens(source.start, source.stop)

    def forward(count: int) -> None:
        for start in range(0, count, 16):
            some = tokens[start : start + 16]
            some = np.pad(some, ((0, 16 - len(some)), (0, 0)))
            jax.block_until_ready(source.lm.loss(some))

    def features(count: int) -> None:
        limited = source._replace(stop=source.start + count)
        pass_over(limited, limits=Limits(), groups=10)

    times = [timed(one, len(tokens)) for one in (forward, features)]
    print(
        f"{run}: {tokens.size:,} tokens; language model {times[0]:.1f} s, feature pass "
        f"{times[1]:.1f} s, {times[1] / times[0]:.2f} times; peak {_gigabytes():.2f} GB"
    )


def timed(work: Callable[[int], Any], count: int) -> float:
    work(32)
    start = time.perf_counter()
    work(count)
    return time.perf_counter() - start


def memory(d_sae: int, k: int, num_tokens: int) -> None:
    """Resident memory while random rows go by, and at the end."""
    config = SAEConfig(d_model=_D_MODEL, d_sae=d_sae, k=k)
    reader = Reader(sae.init(jax.random.key(0), config), config)
    made, rng = FeaturePass(d_sae, limits=Limits()), np.random.default_rng(0)
    contexts = max(2**22 // (d_sae * _ROWS), 1)
    counts, start = np.ones((contexts, _ROWS), bool), time.perf_counter()
    shown = 0
    while made.n_tokens < num_tokens:
        # A few directions stand out, so that latents fire at very different rates.
        x = rng.standard_normal((counts.size, _D_MODEL)).astype(np.float32)
        x *= 1 + 4 * rng.random(_D_MODEL, np.float32) ** 8
        f = encode_counted(reader, x, counts.ravel())
        made.add(np.asarray(f).reshape(contexts, _ROWS, d_sae), counts)
        if made.n_tokens >= shown:
            _say(made.n_tokens, start)
            shown = max(2 * shown, 2**15)
    made.finish()
    _say(made.n_tokens, start)


def _say(n_tokens: int, start: float) -> None:
    seconds = time.perf_counter() - start
    print(
        f"{n_tokens:>12,} tokens {seconds:7.1f} s, peak {_gigabytes():.2f} GB",
        flush=True,
    )


def _gigabytes() -> float:
    """The largest resident memory so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


if __name__ == "__main__":
    main()
