"""`python -m benchmarks.train_step`: our training step and the peers', in turns.

Long-lived workers, one for each implementation and mode, take turns on the same
activations (A B C A B C ...); ratios are of the same round, and medians of those are
printed with their quartiles. A busy machine flatters us, because torch suffers more
from it: how much of the processor went to others is measured and said. Linux only
(/proc).
"""

import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks import table
from benchmarks.turns import Task, Worker, WorkerEnded
from vsae_jax.config import cli
from vsae_jax.config.fields import check_above_zero, check_at_least, flag
from vsae_jax.system.errors import UserError

PEERS = {
    "dictionary_learning": ("dictionary_learning",),
    "saelens": ("saelens",),
    "sparsify": ("sparsify_adam", "sparsify_signum"),
    "authors": ("authors_topk", "authors_vsae_topk"),
}
OURS = ("vsae_jax_topk", "vsae_jax_vsae_topk")
NATIVE = ("vsae_jax_native_topk", "vsae_jax_native_vsae_topk")
MODES = ("float32", "bfloat16")
_BATCHES = 8
_BUSY = 0.05
_LEAST_MEMORY = 2e9


class Shape(NamedTuple):
    """One size of a step."""

    d_sae: int
    k: int
    batch: int


@dataclass(frozen=True)
class StepConfig:
    """Times our training step and those of other libraries, in turns, on the same
    activations in memory."""

    shapes: str = flag("comma list of d_sae x k x batch", "2048x64x1024")
    d_model: int = flag("width of the activations", 512)
    peers: str = flag(
        f"comma list of {', '.join(PEERS)}; empty: none", "dictionary_learning"
    )
    modes: str = flag("comma list of float32, bfloat16", "float32,bfloat16")
    peer_python: str = flag("interpreter that has torch and the peers", "")
    checkout: str = flag(
        "comma list of peer=FOLDER: import that peer from a checkout", ""
    )
    rounds: int = flag("turns of each worker", 7)
    turn_seconds: float = flag("length of a turn, at least one step", 0.7)
    dispatch: int = flag("our steps in one dispatch", 8)
    native: bool = flag("our native kernels, too", False)
    out: str = flag("JSON file for every round's time", "")

    def __post_init__(self):
        check_at_least(self, 1, "d_model", "rounds")
        check_at_least(self, 1, "dispatch")
        check_above_zero(self, "turn_seconds")
        for shape in read_shapes(self.shapes):
            if min(shape) < 1 or shape.k > shape.d_sae:
                raise UserError(f"--shapes: {shape} needs 1 <= k <= d_sae and rows")
        _names(self.peers, PEERS, "peers")
        _names(self.modes, MODES, "modes")
        if self.peers and not Path(self.peer_python).is_file():
            raise UserError(
                f"--peer_python={self.peer_python!r} is no interpreter; name one that "
                "has torch and the peers, or give --peers= to time ours alone"
            )
        for name, folder in _checkouts(self.checkout).items():
            if name not in PEERS or not Path(folder).is_dir():
                raise UserError(f"--checkout: {name}={folder} is no peer=FOLDER")


def read_shapes(text: str) -> list[Shape]:
    """`2048x64x1024,8192x256x1024` as shapes."""
    parts = [part.strip().split("x") for part in text.split(",")]
    try:
        return [Shape(*map(int, part)) for part in parts]
    except (TypeError, ValueError):
        raise UserError(
            f"--shapes={text!r} is no comma list of d_sae x k x batch, such as "
            "2048x64x1024"
        ) from None


def command(configs: Sequence[StepConfig]) -> None:
    """Prints one table for each shape, and writes every time to `--out`."""
    config = configs[0]
    results = []
    for shape in read_shapes(config.shapes):
        with tempfile.TemporaryDirectory() as folder:
            rows = write_activations(
                Path(folder), batch=shape.batch, d_model=config.d_model
            )
            try:
                results.append(measure(config, shape, rows))
            except WorkerEnded as ended:
                raise UserError(str(ended)) from None
    if config.out:
        record = {"config": asdict(config), "shapes": results}
        Path(config.out).write_text(json.dumps(record, indent=1) + "\n")


def write_activations(folder: Path, *, batch: int, d_model: int) -> Path:
    """`[batches, batch, d_model]` float32, exact in bfloat16: of rank d_model / 8 but
    for noise, as a residual stream is nearly; mean squared norm about d_model."""
    rng = np.random.default_rng(0)
    rank = max(d_model // 8, 1)
    shape = (_BATCHES * batch, d_model)
    low = rng.standard_normal((shape[0], rank), np.float32)
    low @= np.diag(np.arange(1, rank + 1, dtype=np.float32) ** -0.5)
    x = low @ rng.standard_normal((rank, d_model), np.float32)
    x += 0.3 * rng.standard_normal(shape, np.float32)
    x *= np.sqrt(d_model / np.square(x).sum(1).mean())
    bits = np.ascontiguousarray(x).view(np.uint32) & np.uint32(0xFFFF0000)
    path = folder / "rows.npy"
    np.save(path, bits.view(np.float32).reshape(_BATCHES, batch, d_model))
    return path


def measure(config: StepConfig, shape: Shape, rows: Path) -> dict[str, Any]:
    """All workers on one shape: prints the table and returns what was measured."""
    print(f"\n## d_model {config.d_model}, d_sae {shape.d_sae}, k {shape.k}, ", end="")
    print(f"batch {shape.batch}, load average {os.getloadavg()[0]:.1f}\n", flush=True)
    with _workers(config, shape, rows) as workers:
        floors = [w for w in workers if w.task.implementation == "matmul"]
        for worker in workers:
            ours = worker.task.implementation in (*OURS, *NATIVE)
            worker.calibrate(
                config.turn_seconds, multiple=config.dispatch if ours else 1
            )
        busy = _Busy()
        for _ in range(config.rounds):
            for worker in workers:
                worker.take_turn()
        others = busy.others(sum(t.cpu_seconds for w in workers for t in w.turns))
        for worker in workers:
            worker.close()
    flop = 10.0 * shape.batch * config.d_model * shape.d_sae
    rates = {w.task.mode: table.spread(t.rate for t in w.turns) for w in floors}
    timed = [_timed(w) for w in workers if w not in floors]
    floor_ms = {mode: 1e3 * flop / rate.median for mode, rate in rates.items()}
    table_rows = table.rows(timed, batch=shape.batch, floor_ms=floor_ms)
    _report(timed, table_rows, rates, floor_ms, others)
    versions: dict[str, str] = {}
    for worker in workers:
        versions |= worker.versions
    return {
        "shape": shape._asdict(),
        "rows": table_rows,
        "rounds_ms": {t.label: t.ms for t in timed},
        "floor_ms": floor_ms,
        "others_share": others,
        "versions": versions,
    }


def _report(timed, table_rows, rates, floor_ms, others: float) -> None:
    for mode, rate in rates.items():
        gigaflops = table.Spread(*(value / 1e9 for value in rate)).text(0)
        print(f"{mode} products {gigaflops} GFLOP/s: floor {floor_ms[mode]:.1f} ms")
    print(f"\n{table.markdown(table_rows)}\n")
    for line in table.comparisons(timed):
        print(line)
    print(f"other processes had {100 * others:.0f} % of the processor", flush=True)
    if others > _BUSY:
        print("BUSY: these ratios are not to be trusted; measure on a quiet machine")


def _timed(worker: Worker) -> table.Timed:
    task = worker.task
    return table.Timed(
        implementation=task.implementation,
        mode=task.mode,
        ms=[turn.ms for turn in worker.turns],
        peak_bytes=worker.peak_bytes,
        first_seconds=worker.first_seconds,
        is_peer=task.implementation not in (*OURS, *NATIVE),
    )


@contextmanager
def _workers(config: StepConfig, shape: Shape, rows: Path) -> Iterator[list[Worker]]:
    """Started one after the other; a peer that is not installed is refused, one that
    does not run in a mode is named and left out."""
    workers: list[Worker] = []
    try:
        for task in _tasks(config, shape, rows):
            ours = task.implementation in (*OURS, *NATIVE, "matmul")
            module = "benchmarks.ours" if ours else "benchmarks.peers"
            # Workers run in the repository; a link to an interpreter stays a link.
            python = sys.executable if ours else os.path.abspath(config.peer_python)
            worker = Worker(task, [python, "-m", module])
            workers.append(worker)
            if worker.missing:
                raise UserError(
                    f"{task.implementation} is not there for {python}: "
                    f"{worker.missing}; install it, name a --checkout or leave it out"
                )
            if worker.refusal:
                print(f"left out: {worker.refusal}\n", flush=True)
                workers.remove(worker)
                worker.kill()
            _check_memory(len(workers))
        yield workers
    finally:
        for worker in workers:
            worker.kill()


def _tasks(config: StepConfig, shape: Shape, rows: Path) -> Iterator[Task]:
    families = _names(config.peers, PEERS, "peers")
    peers = [(name, family) for family in families for name in PEERS[family]]
    checkouts = _checkouts(config.checkout)
    for mode in _names(config.modes, MODES, "modes"):
        ours = "matmul", *OURS, *(NATIVE if config.native else ())
        for name, family in [(name, "") for name in ours] + peers:
            yield Task(
                implementation=name,
                mode=mode,
                **shape._asdict(),
                rows=str(rows),
                checkout=checkouts.get(family, ""),
                dispatch=config.dispatch,
            )


def _check_memory(count: int) -> None:
    for line in Path("/proc/meminfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == "MemAvailable" and int(value.split()[0]) * 1024 < _LEAST_MEMORY:
            raise UserError(
                f"under {_LEAST_MEMORY / 1e9:.0f} GB of memory left with {count} "
                "workers; give fewer --peers or --modes in one command"
            )


class _Busy:
    """How much of the machine's processors went to others than the workers."""

    def __init__(self):
        self._start, self._used = time.monotonic(), _busy_seconds()

    def others(self, workers_seconds: float) -> float:
        """Their share of all processors since the start."""
        seconds = (time.monotonic() - self._start) * (os.cpu_count() or 1)
        return max(_busy_seconds() - self._used - workers_seconds, 0.0) / seconds


def _busy_seconds() -> float:
    fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:8]
    user, nice, system, _idle, _wait, irq, softirq = map(int, fields)
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def _names(text: str, known: Any, name: str) -> list[str]:
    names = [part.strip() for part in text.split(",") if part.strip()]
    wrong = [part for part in names if part not in known]
    if wrong:
        raise UserError(f"--{name}: {wrong[0]!r} is none of {', '.join(known)}")
    return names


def _checkouts(text: str) -> dict[str, str]:
    pairs = [part.partition("=") for part in text.split(",") if part]
    return {name.strip(): os.path.abspath(folder) for name, _, folder in pairs}


if __name__ == "__main__":
    cli.main(command, StepConfig)
