"""Processes that train: order, errors, and no orphan when the parent is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from attnkit.compare import workers
from attnkit.compare.workers import Progress


def square(number: int, progress: Progress) -> tuple[int, int]:
    progress(0.5)
    return number**2, torch.get_num_threads()


def fail(number: int, progress: Progress) -> int:
    if number == 1:
        raise ValueError("the text is empty")
    return number


def vanish(progress: Progress) -> None:
    os._exit(1)


def test_every_job_is_done_once_with_one_thread_and_tells_its_progress() -> None:
    steps = list(workers.run(square, [(n,) for n in range(5)], processes=2))
    assert {step.job: step.result for step in steps if step.finished} == {n: (n**2, 1) for n in range(5)}
    assert sorted(step.job for step in steps if step.done == 0.5) == list(range(5))


def test_an_error_is_raised_where_the_user_is_with_its_origin() -> None:
    with pytest.raises(ValueError, match="the text is empty") as caught:
        list(workers.run(fail, [(n,) for n in range(3)], processes=1))
    assert "in fail" in caught.value.__notes__[0]


def test_a_process_that_vanishes_is_told() -> None:
    with pytest.raises(ChildProcessError, match="ended without a word, perhaps for lack of memory"):
        list(workers.run(vanish, [()], processes=1))


SLEEPER = """
import os, sys, time
from attnkit.compare import workers

def tell_and_sleep(progress):
    print(os.getpid(), flush=True)
    while True:
        time.sleep(0.05)
        progress(0.5)

if __name__ == "__main__":
    list(workers.run(tell_and_sleep, [()], processes=1))
"""


def test_processes_end_when_the_parent_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "sleeper.py"
    script.write_text(SLEEPER)
    parent = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    worker = int(parent.stdout.readline())
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    for _ in range(100):
        if not _alive(worker):
            return
        time.sleep(0.1)
    pytest.fail(f"process {worker} outlived its parent")


def _alive(process: int) -> bool:
    try:
        with open(f"/proc/{process}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
