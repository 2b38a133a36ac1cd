"""Workers that take turns: one process per implementation and mode, driven by lines of
JSON over pipes.

A worker gets its task, answers `ready` after its first step, then for each
`{"steps": n}` runs one step that is not timed and n that are, and says how long the n
took. It runs under its own interpreter: this file needs the standard library only.
"""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent


class Task(NamedTuple):
    """What a worker is to time. `rows` is a float32 `.npy` `[batches, batch, d_model]`;
    `checkout` a folder to import from, or empty; `dispatch` our steps in one call."""

    implementation: str
    mode: str
    d_sae: int
    k: int
    batch: int
    rows: str
    checkout: str = ""
    dispatch: int = 8

    @property
    def label(self) -> str:
        """The implementation and its mode."""
        return f"{self.implementation} {self.mode}"


class Turn(NamedTuple):
    """One turn: milliseconds a step, processor seconds the worker used, and the best
    rate of a matrix product in FLOP/s where that is what is timed."""

    ms: float
    cpu_seconds: float
    rate: float


# Runs n steps and waits for their results; gives a rate of its own, or 0.
Steps = Callable[[int], float]


def serve(make: Callable[[Task], tuple[Steps, dict[str, Any]]]) -> None:
    """The worker's loop. `make` builds the steps and says which versions they use."""
    # What a library prints must not end up among the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(**fields: Any) -> None:
        answers.write(json.dumps(fields) + "\n")
        answers.flush()

    task = Task(**json.loads(sys.stdin.readline()))
    try:
        steps, versions = make(task)
        made = time.perf_counter()
        steps(1)
    except ImportError as error:
        answer(missing=str(error))
        return
    first_seconds = time.perf_counter() - made
    answer(ready=versions, first_seconds=first_seconds)
    for line in sys.stdin:
        count = json.loads(line)["steps"]
        if not count:
            answer(peak_bytes=_peak_bytes())
            return
        cpu = time.process_time()
        steps(1)
        start = time.perf_counter()
        rate = steps(count)
        ms = 1e3 * (time.perf_counter() - start) / count
        answer(ms=ms, cpu_seconds=time.process_time() - cpu, rate=rate)


def _peak_bytes() -> int:
    """The largest resident set so far: VmHWM, as a child inherits ru_maxrss."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


class WorkerEnded(Exception):
    """A worker ended before it answered; the message holds its last words."""


class Worker:
    """The driver's end of one worker. `missing` says what is not installed, `refusal`
    why it does not run; both are empty when it is ready."""

    def __init__(self, task: Task, command: Sequence[str]):
        self.task = task
        self.turns: list[Turn] = []
        self.peak_bytes = 0
        self._count = 1
        self._log = tempfile.TemporaryFile("w+")
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            cwd=ROOT,
        )
        reply: dict[str, Any]
        try:
            reply = self._ask(json.dumps(task._asdict()))
        except WorkerEnded as ended:
            reply = {"refusal": str(ended)}
        self.missing: str = reply.get("missing", "")
        self.refusal: str = reply.get("refusal", "")
        self.versions: dict[str, str] = reply.get("ready", {})
        self.first_seconds = float(reply.get("first_seconds", 0.0))

    def calibrate(self, turn_seconds: float, *, multiple: int) -> None:
        """Chooses how many steps a turn has: `turn_seconds` of them, in whole
        dispatches of `multiple`."""
        ms = self._run(multiple).ms
        self._count = max(round(1e3 * turn_seconds / ms / multiple), 1) * multiple

    def take_turn(self) -> None:
        """One more turn."""
        self.turns.append(self._run(self._count))

    def close(self) -> None:
        """Asks for the peak memory and ends the worker."""
        self.peak_bytes = int(self._ask('{"steps": 0}')["peak_bytes"])
        self.kill()

    def kill(self) -> None:
        """Ends the worker, whatever it does."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._log):
            if stream:
                stream.close()

    def _run(self, count: int) -> Turn:
        return Turn(**self._ask(json.dumps({"steps": count})))

    def _ask(self, line: str) -> dict[str, Any]:
        assert self._process.stdin and self._process.stdout
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
        if reply := self._process.stdout.readline():
            return json.loads(reply)
        status = self._process.wait()
        self._log.seek(0)
        lines = [text for text in self._log.read().split("\n") if text.strip()]
        last = lines[-1] if lines else "it said nothing"
        raise WorkerEnded(f"{self.task.label} ended with status {status}: {last}")
