"""What a person sees while a comparison runs."""

from __future__ import annotations

import io
import re
import time

import pytest
from rich.console import Console

from attnkit.compare.display import Display, Job

JOBS = [Job("first", 10.0), Job("second", 30.0)]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time in seconds, to be set by the test."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return now


def test_each_finished_job_is_a_line_with_the_time_left(clock: list[float]) -> None:
    out = io.StringIO()
    with Display(Console(file=out, width=100), JOBS) as display:
        display.update(JOBS[0], 0.5)
        clock[0] = 20.0  # half as fast as expected
        display.finish(JOBS[0], "2.1 bits per byte")
        display.update(JOBS[1], 0.1)
        clock[0] = 80.0
        display.finish(JOBS[1])
    assert out.getvalue().splitlines() == [
        "[1/2] first: 2.1 bits per byte (20 s, 60 s left)",
        "[2/2] second (60 s)",
    ]


def test_a_terminal_shows_a_bar_a_running_job_and_one_for_all(clock: list[float]) -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=100)
    with Display(console, JOBS) as display:
        display.update(JOBS[0], 0.0)
        clock[0] = 10.0
        display.update(JOBS[0], 0.5)
        assert display._bars is not None
        display._bars.refresh()
        display.finish(JOBS[0], "2.1 bits per byte")
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", out.getvalue())
    assert re.search(r"all of it +\S+ +12 % 70 s left", shown)
    assert re.search(r"first +\S+ +50 % 10 s", shown)
    assert "first: 2.1 bits per byte (10 s)" in shown


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(3.0, "3.0 s"), (50.0, "50 s"), (400.0, "7 min"), (20_000.0, "5 h 33 min")],
)
def test_times_are_said_as_people_do(clock: list[float], seconds: float, said: str) -> None:
    out = io.StringIO()
    with Display(Console(file=out, width=100), JOBS[:1]) as display:
        display.start(JOBS[0])
        clock[0] = seconds
        display.finish(JOBS[0])
    assert out.getvalue() == f"[1/1] first ({said})\n"
