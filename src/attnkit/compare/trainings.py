"""One training as a job for a worker, and its result as lines."""

from __future__ import annotations

import math
from dataclasses import dataclass

from attnkit.compare import rows, train
from attnkit.compare.corpus import Corpus
from attnkit.compare.setups import Setup
from attnkit.compare.store import Line
from attnkit.compare.workers import Progress
from attnkit.dispatch import watch


@dataclass(frozen=True)
class Training:
    """A row's decoder to train on the text, or on the tasks."""

    kind: str
    row: str
    seed: int

    def lines(self, setup: Setup) -> list[Line]:
        """What its results are about, without the results."""
        about = {"kind": self.kind, "row": self.row, "seed": self.seed}
        if self.kind == "text":
            return [about]
        return [about | {"task": task} for task in dict.fromkeys(exam.task for exam in setup.tasks.exams)]


def run(setup: Setup, corpus: Corpus, training: Training, progress: Progress) -> list[Line]:
    """Train, judge, and say it in lines."""
    (row,) = rows.select([training.row])
    backends: set[str] = set()
    with watch() as ran:

        def step(done: float) -> None:
            # Told after each training step: what runs later, without gradients, judges.
            backends.update(backend for _, backend in ran)
            progress(done)

        if training.kind == "text":
            layers = setup.text.shape.layers
            results = [_text(train.text(row.layer, setup.text, corpus, seed=training.seed, progress=step))]
        else:
            layers = setup.tasks.shape.layers
            results = _tasks(train.task(row.layer, setup.tasks, seed=training.seed, progress=step))
    trained: Line = {"backend": "+".join(sorted(backends))}
    if row.hybrid:
        trained["layers"] = row.kinds(layers)
    return [about | result | trained for about, result in zip(training.lines(setup), results, strict=True)]


def _text(result: train.TextResult) -> Line:
    return {
        "parameters": result.parameters,
        "tokens": result.tokens,
        "bits_per_byte": _rounded(result.bits_per_byte),
        "curve": [[tokens, _rounded(bits)] for tokens, bits in result.curve],
        "train_tokens_per_second": round(result.tokens / result.seconds, 1),
        "seconds": round(result.seconds, 2),
    }


def _tasks(result: train.TaskResult) -> list[Line]:
    """One line a task, in the order of the exams."""
    points: dict[str, list[Line]] = {}
    for exam, accuracy in result.points:
        place = {"length": exam.length} | ({"pairs": exam.pairs} if exam.task == "recall" else {})
        found = place | {"accuracy": _rounded(accuracy), "state_bytes": result.state[exam.length]}
        points.setdefault(exam.task, []).append(found)
    *_, longest, twice = result.state
    same = {
        "parameters": result.parameters,
        "tokens": result.tokens,
        "seconds": round(result.seconds, 2),
        "state_bytes_per_token": (result.state[twice] - result.state[longest]) / longest,
    }
    return [{"points": found} | same for found in points.values()]


def _rounded(value: float) -> float | None:
    """None for a training that diverged: JSON has no NaN."""
    return round(value, 5) if math.isfinite(value) else None
