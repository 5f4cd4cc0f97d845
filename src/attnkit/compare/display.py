"""What a person sees while it runs: bars with the time left on a terminal, a line for each finished job elsewhere."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn


@dataclass(frozen=True)
class Job:
    """A piece of work that shows its progress; ``seconds`` is what it took on the machine where it was tuned."""

    title: str
    seconds: float


class Display:
    """Progress of ``jobs``, all of them known beforehand so that the time left can be told from the first on.

    The time left assumes that this machine is slower or faster than ours by the same factor for what is left as for
    what is done.
    """

    def __init__(self, console: Console, jobs: Sequence[Job]) -> None:
        self._console = console
        self._done = dict.fromkeys(jobs, 0.0)
        self._started: dict[Job, float] = {}
        self._finished = 0
        self._start = time.perf_counter()
        self._bars: Progress | None = None
        if console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:3.0f} %"))
            self._bars = Progress(*columns, TextColumn("{task.fields[left]}"), console=console, transient=True)
            self._overall = self._bars.add_task("all of it", total=1.0, left="")
        self._tasks: dict[Job, TaskID] = {}

    def __enter__(self) -> Display:
        if self._bars:
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bars:
            self._bars.stop()

    def start(self, job: Job) -> None:
        self._started[job] = time.perf_counter()
        if self._bars:
            self._tasks[job] = self._bars.add_task(job.title, total=1.0, left="")

    def update(self, job: Job, done: float) -> None:
        """Tell that the fraction ``done`` of ``job`` is done."""
        if job not in self._started:
            self.start(job)
        self._done[job] = done
        if self._bars:
            spent = time.perf_counter() - self._started[job]
            left = _time(spent * (1 - done) / done) if done and spent > 1 else ""
            self._bars.update(self._tasks[job], completed=done, left=left)
            self._bars.update(self._overall, completed=self._fraction(), left=self._left())

    def finish(self, job: Job, result: str = "") -> None:
        """``job`` is done; ``result`` says in a few words what came out."""
        self.update(job, 1.0)
        self._finished += 1
        spent = time.perf_counter() - self._started[job]
        said = f"{job.title}: {result}" if result else job.title
        if self._bars:
            self._bars.remove_task(self._tasks.pop(job))
            if result:
                self._console.print(f"{said} ({_time(spent)})", markup=False)
        else:
            times = ", ".join(part for part in (_time(spent), self._left()) if part)
            self._console.print(f"[{self._finished}/{len(self._done)}] {said} ({times})", markup=False)

    def _fraction(self) -> float:
        return sum(job.seconds * done for job, done in self._done.items()) / sum(job.seconds for job in self._done)

    def _left(self) -> str:
        done, spent = self._fraction(), time.perf_counter() - self._start
        return f"{_time(spent * (1 - done) / done)} left" if spent > 1 and 0 < done < 1 else ""


def _time(seconds: float) -> str:
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
