"""The stream of batches by itself: `python -m benchmarks.input --activations=DIR`.

Every batch is taken and put on the device, over whole epochs, so that the mean holds
the loading of groups; the same is done with batches that lie in memory already. A first
epoch, which checks the checksums and fills the page cache, is not counted.
"""

import itertools
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import jax
import numpy as np

from vsae_jax.activations.shards import Activations
from vsae_jax.activations.shuffle import ShuffledRows
from vsae_jax.config import Hook, cli
from vsae_jax.config.fields import check_at_least, flag

_COLUMNS = "{:>10}{:>9}{:>14}{:>14}{:>14}{:>14}"
_KEPT_BYTES = 2**26


@dataclass(frozen=True)
class InputConfig:
    """Measures what a training batch costs before the step: ms from shards that are in
    the page cache, and from memory."""

    activations: str = flag(
        "folder that extract wrote",
        f"activations/pythia-70m-deduped/{Hook(0).name}",
    )
    batch_size: int = flag("rows in a batch", 1024, grid=True)
    epochs: int = flag("that are counted, after one that is not", 2)
    step_ms: int = flag("ms that each batch is waited over, as a step would take", 0)
    prefetch: bool = flag("the next group is loaded in a thread", True)

    def __post_init__(self):
        check_at_least(self, 1, "batch_size", "epochs")
        check_at_least(self, 0, "step_ms")


def command(configs: Sequence[InputConfig]) -> None:
    """A row of the table for every batch size."""
    titles = ("batch", "batches", "stream ms", "worst ms", "memory ms", "more/1024")
    activations = Activations.open(configs[0].activations)
    print(f"{activations.n_rows:,} rows of {activations.row_bytes} bytes")
    print(_COLUMNS.format(*titles))
    for config in configs:
        streamed, held = measure(config, activations)
        stream, memory = statistics.mean(streamed), statistics.mean(held)
        numbers = (stream, max(streamed), memory)
        more = (stream - memory) * 1024 / config.batch_size
        cells = (f"{number:.3f}" for number in (*numbers, more))
        print(_COLUMNS.format(config.batch_size, len(streamed), *cells), flush=True)


def measure(
    config: InputConfig, activations: Activations
) -> tuple[list[float], list[float]]:
    """The ms of each batch from the stream and from memory, the steps left out."""
    size = config.batch_size
    n_batches = max(activations.n_rows // size, 1)
    with ShuffledRows(
        activations.view,
        n_rows=activations.n_rows,
        row_bytes=activations.row_bytes,
        seed=0,
        prefetch=config.prefetch,
    ) as rows:
        batches = (rows.take(n * size, size) for n in itertools.count())
        for _ in range(n_batches):
            next(batches)
        n_kept = max(_KEPT_BYTES // (size * activations.row_bytes), 1)
        kept = list(itertools.islice(batches, min(n_kept, n_batches)))
        n_timed = config.epochs * n_batches
        streamed = list(itertools.islice(_timed(batches, config.step_ms), n_timed))
        memory = _timed(itertools.cycle(kept), config.step_ms)
        return streamed, list(itertools.islice(memory, n_timed))


def _timed(batches: Iterator[np.ndarray], step_ms: int) -> Iterator[float]:
    """The ms until each batch is on the device."""
    while True:
        began = time.perf_counter()
        jax.block_until_ready(jax.device_put(next(batches)))
        yield 1e3 * (time.perf_counter() - began)
        time.sleep(step_ms / 1e3)


if __name__ == "__main__":
    cli.main(command, InputConfig)
