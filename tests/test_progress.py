"""Progress as a bar on a terminal and as lines elsewhere."""

import io

import pytest

from vsae_jax.system import progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def lines(stream: io.StringIO, clock: Clock, **options) -> progress.Lines:
    return progress.Lines(
        **{"total": 4000, "unit": "steps", "start": 0, **options},
        stream=stream,
        clock=clock,
    )


def test_the_kind_follows_the_stream():
    assert isinstance(progress.bar(1, unit="steps", stream=Terminal()), progress.Bar)
    plain = progress.bar(1, unit="steps", stream=io.StringIO())
    assert isinstance(plain, progress.Lines)


def test_a_line_every_ten_seconds_and_one_at_the_end():
    stream, clock = io.StringIO(), Clock()
    with lines(stream, clock) as bar:
        for _ in range(25):
            clock.now += 1
            bar.update(100)
    written = stream.getvalue().splitlines()
    assert written == [
        "1,000 of 4,000 steps, 100 steps/s, 00:30 left",
        "2,000 of 4,000 steps, 100 steps/s, 00:20 left",
        "2,500 of 4,000 steps, 100 steps/s, 00:15 left",
    ]


def test_the_rate_is_of_this_process_when_it_resumes():
    stream, clock = io.StringIO(), Clock()
    with lines(stream, clock, total=5_000_000, start=3_000_000, unit="tokens") as bar:
        clock.now += 2
        bar.update(1_000_000)
    expected = "4,000,000 of 5,000,000 tokens, 500k tokens/s, 00:02 left\n"
    assert stream.getvalue() == expected


def test_what_compiling_took_is_not_in_the_rate():
    stream, clock = io.StringIO(), Clock()
    with lines(stream, clock) as bar:
        clock.now += 30
        bar.update(100)
        clock.now += 10
        bar.update(1000)
    first, second, _ = stream.getvalue().splitlines()
    assert first == "100 of 4,000 steps, 3.33 steps/s, 19:30 left"
    assert second == "1,100 of 4,000 steps, 100 steps/s, 00:29 left"


@pytest.mark.parametrize("seconds, said", [(0.1, "10 s"), (3, "5 min"), (100, "2.8 h")])
def test_a_forecast_is_of_the_second_part(seconds, said, capsys):
    clock, said_at = Clock(), {}
    for part in progress.forecast(range(5), count=100, what="core", clock=clock):
        clock.now += seconds if part else 1000
        said_at[part] = capsys.readouterr().out
    assert said_at == {0: "", 1: "", 2: f"core: about {said}\n", 3: "", 4: ""}


def test_numbers_follow_the_rate_and_the_last_ones_win():
    stream, clock = io.StringIO(), Clock()
    with lines(stream, clock) as bar:
        clock.now += 1
        bar.show({"loss": 5.0})
        bar.show({"loss": 0.123456, "l0": 32.0})
        bar.update(4000)
    assert stream.getvalue().endswith("steps/s, loss 0.1235, l0 32\n")


def test_words_are_shown_as_they_are():
    stream = io.StringIO()
    with lines(stream, Clock()) as bar:
        bar.show({"EV": "0.9 to 0.95 over 2 arms", "rows/s": 3.0})
    assert stream.getvalue().endswith(", EV 0.9 to 0.95 over 2 arms, rows/s 3\n")


def test_no_time_passed_is_no_division_by_zero():
    stream = io.StringIO()
    with lines(stream, Clock()) as bar:
        bar.update(1)
    assert stream.getvalue() == "1 of 4,000 steps, 0 steps/s\n"


def test_the_bar_shows_unit_start_and_numbers():
    stream = Terminal()
    with progress.bar(2000, unit="tokens", start=500, stream=stream) as bar:
        bar.show({"loss": 0.25})
        bar.update(1500)
    last = stream.getvalue().split("\r")[-1]
    assert "2.00k/2.00k" in last and "tokens/s" in last and "loss 0.25" in last
