"""How many steps one call to the device makes.

A call cannot be interrupted, so it should take about a second, judged by the time of
the calls before it, even if `--steps_per_dispatch` allows more. The result of a run
does not depend on it.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

from vsae_jax.config import TrainConfig
from vsae_jax.system import processes

# Longer calls would not train faster, and a signal is noticed only after a call.
CALL_S = 1.0
_MOST_AHEAD = 2


class Chunk(NamedTuple):
    """The steps `start` to `stop` of one call, and what follows them."""

    start: int
    stop: int
    log: bool
    save: bool


class Pace:
    """How the steps of a run are divided into calls.

    at_once: the steps of the next call, at most `most`. One until calls were measured;
      but always `most` in processes that train together, as all must take the same.
    ahead: how many calls may wait for the device: one where calls are long, as more
      would gain little.
    """

    def __init__(self, most: int):
        self.most, self.ahead = most, 1
        self.at_once = 1 if processes.count() == 1 else most

    def took(self, seconds: float, *, steps: int) -> None:
        """Notes how long the last calls took, which made `steps` steps in all."""
        a_step = max(seconds, 1e-9) / steps
        if processes.count() == 1:
            self.at_once = int(min(max(CALL_S / a_step, 1), self.most))
        self.ahead = 1 if self.at_once * a_step > CALL_S / 2 else _MOST_AHEAD


def chunks(begin: int, config: TrainConfig, pace: Pace) -> Iterator[Chunk]:
    """The calls from step `begin` to the end, cut at every log line and checkpoint;
    each is as long as `pace` says at that time."""
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
