"""How many steps one call to the device takes.

A call cannot be interrupted, so it takes about a second, by the measured time of the
calls before it, however many steps `--steps_per_dispatch` allows. What a run becomes
does not depend on it.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

from vsae_jax.config import TrainConfig
from vsae_jax.system import processes

# Longer calls would not train faster, and a signal is heard after one.
CALL_S = 1.0
_MOST_AHEAD = 2


class Chunk(NamedTuple):
    """Steps `start` to `stop` in one call, and what follows them."""

    start: int
    stop: int
    log: bool
    save: bool


class Pace:
    """The steps of the next call, `at_once`, of at most `most`, and how many calls may
    wait for the device, `ahead`: one where calls are long, as then little is won by
    more. One step in one call until calls were measured; but processes that train
    together take `most` steps always, as all must take the same."""

    def __init__(self, most: int):
        self.most, self.ahead = most, 1
        self.at_once = 1 if processes.count() == 1 else most

    def took(self, seconds: float, *, steps: int) -> None:
        """Takes note of how long the last calls took, of so many steps in all."""
        a_step = max(seconds, 1e-9) / steps
        if processes.count() == 1:
            self.at_once = int(min(max(CALL_S / a_step, 1), self.most))
        self.ahead = 1 if self.at_once * a_step > CALL_S / 2 else _MOST_AHEAD


def chunks(begin: int, config: TrainConfig, pace: Pace) -> Iterator[Chunk]:
    """Calls from step `begin` to the end, cut at every log line and checkpoint; each
    as long as `pace` says when it is asked for."""
    while begin < config.steps:
        ends = _next(begin, config.log_every), _next(begin, config.checkpoint_every)
        stop = int(min(begin + pace.at_once, *ends, config.steps))
        last = stop == config.steps
        log = last or stop % config.log_every == 0
        every = config.checkpoint_every
        yield Chunk(begin, stop, log, every > 0 and (last or stop % every == 0))
        begin = stop


def _next(step: int, every: int) -> float:
    return (step // every + 1) * every if every else math.inf
