"""Trainings side by side, each in a process of its own with one thread.

Models this small do not get faster with a second thread; two of them on two cores do. It also makes what is learned
independent of the number of cores.
"""

from __future__ import annotations

import multiprocessing
import signal
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any

import torch

MOST = 8
"""Processes at most: each holds a copy of the corpus and of torch, half a gigabyte."""

Progress = Callable[[float], None]
"""Told the fraction of the work that is done."""


@dataclass(frozen=True)
class Step:
    """Progress of a job; with its result when it is finished."""

    job: int
    done: float
    result: Any = None
    finished: bool = False


def run(function: Callable[..., Any], jobs: Sequence[tuple[Any, ...]], processes: int) -> Iterator[Step]:
    """Call ``function(*job, progress)`` for each job, in order, ``processes`` at a time; yield steps as they happen.

    The first error stops everything and is raised here. Processes end with the iterator, and also when this process is
    killed: their pipe breaks.
    """
    context = multiprocessing.get_context("spawn")  # a fork after OpenMP has started threads can hang
    waiting = list(enumerate(jobs))
    running: list[Connection] = []
    alive: list[tuple[SpawnProcess, Connection]] = []
    try:
        for _ in range(min(processes, len(waiting), MOST)):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(function, theirs), daemon=True)
            process.start()
            theirs.close()
            alive.append((process, ours))
            running.append(ours)
            ours.send(waiting.pop(0))
        while running:
            for ready in wait(running):
                assert isinstance(ready, Connection)
                try:
                    step = ready.recv()
                except EOFError:
                    raise ChildProcessError(
                        "a training process ended without a word, perhaps for lack of memory: free some, or use fewer "
                        "threads (OMP_NUM_THREADS=1 trains one model at a time), then go on with --resume"
                    ) from None
                if isinstance(step, Exception):
                    raise step
                if step.finished:
                    if waiting:
                        ready.send(waiting.pop(0))
                    else:
                        running.remove(ready)
                yield step
    finally:
        for process, ours in alive:
            ours.close()
            process.terminate()
        for process, _ in alive:
            process.join()


def _serve(function: Callable[..., Any], parent: Connection) -> None:
    """A worker's life: jobs in, progress and results out, until the pipe breaks."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to every process of the terminal; the parent handles it
    torch.set_num_threads(1)
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            index, job = parent.recv()
            try:
                result = function(*job, partial(_tell, parent, index))
            except (BrokenPipeError, ConnectionResetError):
                return
            except Exception as error:  # whatever it is, it is raised again where the user is
                error.add_note(traceback.format_exc())
                parent.send(error)
            else:
                parent.send(Step(index, 1.0, result, finished=True))


def _tell(parent: Connection, index: int, done: float) -> None:
    parent.send(Step(index, done))
