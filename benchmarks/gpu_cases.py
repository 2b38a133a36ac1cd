"""What `benchmarks.gpu` measures, and how its two programs are told: one line of JSON
for each case, in either environment. The standard library only."""

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple


class Case(NamedTuple):
    """One step to time. kind: eager, compiled or cudagraphs of torch; of ours single,
    known or graphs (with a count of steps that is known), grid (arms at once), turns
    (arms one after another), or select, the selection alone. top_k: our way to select.
    seconds: length of each of `rounds` measurements."""

    library: str
    kind: str
    variant: str
    mode: str
    d_model: int
    d_sae: int
    k: int
    batch: int
    platform: str
    seconds: float
    rounds: int
    arms: int = 1
    top_k: str = "auto"

    @property
    def shape(self) -> str:
        return f"{self.d_sae}x{self.k}x{self.batch}"


def answer_all(
    measure: Callable[[Case], dict[str, float]],
    *,
    versions: Callable[[list[Case], float], dict[str, Any]],
    errors: tuple[type[Exception], ...],
) -> None:
    """Says what `versions` gives for the cases on standard input and the seconds that
    there are, then measures them until those are spent; one that fails by one of
    `errors` is named with its message."""
    # What a library prints must not end up among the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(value: dict[str, Any]) -> None:
        answers.write(json.dumps(value) + "\n")
        answers.flush()

    request = json.load(sys.stdin)
    end = time.monotonic() + request["budget_seconds"]
    cases = [Case(**fields) for fields in request["cases"]]
    answer(versions(cases, request["budget_seconds"]))
    for number, case in enumerate(cases):
        if time.monotonic() > end:
            answer({"case": number, "skipped": "the time was spent"})
            continue
        start = time.monotonic()
        try:
            result: dict[str, Any] = dict(measure(case))
        except errors as error:
            lines = str(error).splitlines() or [""]
            result = {"skipped": f"{type(error).__name__}: {lines[0][:200]}"}
        answer({"case": number, "took": time.monotonic() - start} | result)
