"""How many steps a call to the device takes, by the time that calls took."""

import pytest

from vsae_jax.config import TrainConfig
from vsae_jax.training.pace import CALL_S, Pace, chunks


@pytest.mark.parametrize(
    ("seconds", "steps", "at_once", "ahead"),
    [
        (0.01, 1, 10, 2),  # as many as are allowed, and another call may wait
        (0.25 * CALL_S, 1, 4, 1),
        (2.0 * CALL_S, 8, 4, 1),  # of several steps together
        (4.0 * CALL_S, 1, 1, 1),  # a step of seconds: each alone, none waits
        (0.09 * CALL_S, 1, 10, 1),
        (0.0, 3, 10, 2),
    ],
)
def test_a_call_takes_about_a_second_or_one_step(seconds, steps, at_once, ahead):
    pace = Pace(10)
    assert (pace.at_once, pace.ahead) == (1, 1)
    pace.took(seconds, steps=steps)
    assert (pace.at_once, pace.ahead) == (at_once, ahead)


def test_a_machine_that_is_busy_for_a_while_slows_the_pace_only_then():
    pace = Pace(100)
    for seconds, at_once in ((0.01, 100), (3.0, 33), (9.0, 3), (0.02, 100)):
        pace.took(seconds, steps=100 if pace.at_once > 50 else pace.at_once)
        assert pace.at_once == at_once


def test_calls_follow_the_pace_and_end_at_log_lines_and_checkpoints():
    config = TrainConfig(steps=20, log_every=8, checkpoint_every=12)
    pace, found = Pace(6), []
    for chunk in chunks(0, config, pace):
        found.append((chunk.start, chunk.stop, chunk.log, chunk.save))
        pace.took(0.01, steps=1)
        if chunk.stop == 12:
            pace.took(0.5 * CALL_S, steps=1)  # another job has begun
    assert found == [
        (0, 1, False, False),
        (1, 7, False, False),
        (7, 8, True, False),
        (8, 12, False, True),
        (12, 14, False, False),
        (14, 16, True, False),
        (16, 20, True, True),
    ]
