"""The run itself: what is measured in which order, and what of it is there already."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from functools import partial
from importlib.util import find_spec

import torch
from rich.console import Console, RenderableType

from attnkit import bench, native, report
from attnkit.compare import corpus, measure, setups, trainings, workers
from attnkit.compare.corpus import Corpus
from attnkit.compare.display import Display, Job
from attnkit.compare.measure import SpeedPlan
from attnkit.compare.options import CompareOptions
from attnkit.compare.setups import Setup, Shape
from attnkit.compare.store import FORMAT, REPORT, Line, Store
from attnkit.compare.trainings import Training
from attnkit.compare.words import words
from attnkit.masks import Mask
from attnkit.models import hybrids
from attnkit.spec import LayerPlace

# What parts took on two cores of a Zen 5; it only weighs them against each other for the time left.
LIMITS = Job("limits of this machine", 1.0)
KERNEL_SECONDS, SPEED_SECONDS = 2.5, 3.5
MASK_CELLS = 24
KERNELS = ("K1", "K2", "K5")
"""The figures of the bench whose peer is torch's SDPA: what a model runs without attnkit."""
WIDTH = 160
"""Columns where there is no terminal to ask."""


def run(options: CompareOptions) -> None:
    """Measure what ``options`` ask for, or what is missing of it; print the table and write the report.

    Raises ``ValueError`` or ``OSError`` with one sentence for bad options, texts and folders. On Ctrl-C or a kill every
    finished line is on disk, and the same options with ``resume`` go on.
    """
    for package in ("altair", "vl_convert"):
        if find_spec(package) is None:  # said now, and not after minutes of work
            raise ModuleNotFoundError(
                f"the report draws with {package}, which is not installed: pip install 'attnkit[compare]'"
            )
    if options.quick:
        run_setup(options, setups.quick(), measure.QUICK)
    else:
        run_setup(options, setups.full(), measure.FULL)


def run_setup(options: CompareOptions, setup: Setup, plan: SpeedPlan) -> None:
    """``run`` with any set-up: tests have one of seconds."""
    console = _console(options.json)
    tokenizer = options.tokenizer or setup.text.tokenizer
    with console.status("reading the text"):
        text = corpus.load(options.text or None, tokenizer=tokenizer, vocab=setup.text.vocab)
    settings = {
        "quick": options.quick,
        "text": text.name,
        "bytes": text.bytes,
        "digest": text.digest,
        "tokenizer": text.tokenizer,
        "seeds": list(options.seeds or setup.seeds),
        "rows": [row.name for row in options.rows],
        "threads": torch.get_num_threads(),
    }
    results = Store(options.out, bench.provenance(settings) | {"format": FORMAT}, resume=options.resume)
    try:
        _Run(options, setup, plan, text, results, console).everything()
    finally:
        results.close()


class _Run:
    """One run over ``results``: every part skips what is there already."""

    def __init__(
        self,
        options: CompareOptions,
        setup: Setup,
        plan: SpeedPlan,
        text: Corpus,
        results: Store,
        console: Console,
    ) -> None:
        self.options, self.setup, self.plan, self.text = options, setup, plan, text
        self.results, self.console = results, console
        self.processes = min(torch.get_num_threads(), workers.MOST)
        # Without the native library there is neither a limit to reach nor a kernel to time.
        self.wants_limits = native.STATUS.available and {"kind": "limits"} not in results
        self.cases = [
            case
            for case in (bench.cases(KERNELS, options.quick) if native.STATUS.available else ())
            if {"kind": "kernel", "id": case.id, "work": case.work, "model": case.model} not in results
        ]
        self.untimed = [row for row in options.rows if {"kind": "speed", "row": row.name} not in results]
        self.trainings = [
            training for training in self._all_trainings() if any(line not in results for line in training.lines(setup))
        ]

    def everything(self) -> None:
        for notice in self.results.notices:
            self.console.print(notice, markup=False, soft_wrap=True)
        for line in self.results.lines:
            self._print_json(line)
        self._draw_masks()
        kernels = {_kernel_job(case): case for case in self.cases}
        speed = Job("speed of the rows", SPEED_SECONDS * len(self.untimed))
        learning = {self._training_job(training): training for training in self.trainings}
        jobs = [*([LIMITS] if self.wants_limits else []), *kernels, *([speed] if self.untimed else []), *learning]
        with Display(self.console, jobs) as display:
            self._time_kernels(display, kernels)
            self._time_rows(display, speed)
            self._train(display, learning)
        self._show(report.table(self.results.lines))
        path = self.options.out / REPORT
        report.write_html(self.results.lines, path)
        self.console.print(f"the report: {path}", markup=False, soft_wrap=True)

    def _all_trainings(self) -> Iterator[Training]:
        """All rows with one seed before any with the next: what is there when a run is stopped can be compared."""
        for seed in self.results.header["settings"]["seeds"]:
            for kind in ("text", "task"):
                for row in self.options.rows:
                    yield Training(kind, row.name, seed)

    def _draw_masks(self) -> None:
        """The masks that the text is learned with, one picture for each kind of layer."""
        shape = self.setup.text.shape
        length = 3 * shape.window
        lines = []
        for row in self.options.rows:
            masks: dict[Mask, str] = {}
            for layer in range(shape.layers):
                place = LayerPlace(shape.width, shape.heads, shape.window, layer, shape.layers)
                mask = getattr(hybrids.at(row.pattern, place)[1].configure(place), "mask", None)
                if isinstance(mask, Mask):
                    alone = not (masks or row.hybrid)
                    masks.setdefault(mask, row.title if alone else f"layer {layer + 1}: {row.title}")
            for mask, title in masks.items():
                about = {"kind": "mask", "row": row.name, "title": title}
                if about not in self.results:
                    picture = mask.draw(length, cells=MASK_CELLS)
                    lines.append(about | {"name": row.title, "n": length, "picture": picture})
        self._keep(lines)
        if lines:
            self._show(report.pictures(lines))

    def _time_kernels(self, display: Display, jobs: dict[Job, bench.Case]) -> None:
        if self.wants_limits:
            display.start(LIMITS)
            self._keep([bench.limits().line()])
            display.finish(LIMITS)
        for job, case in jobs.items():
            display.start(job)
            self._keep([bench.measure(case).line()])
            display.finish(job)
        if self.wants_limits or jobs:
            self._show(report.kernel_table(self.results.lines))
        elif not native.STATUS.available:
            self.console.print(f"no kernels to time: {native.STATUS.reason}", markup=False)

    def _time_rows(self, display: Display, job: Job) -> None:
        """All rows in one part, because they take turns."""
        if not self.untimed:
            return
        lines = measure.speed(self.untimed, self.plan, partial(display.update, job))
        self._keep(lines)
        display.finish(job)
        for line in lines:
            if line["cache_allocated"] != line["cache_predicted"]:
                self.console.print(
                    f"{line['row']}: its cost predicts {line['cache_predicted']} bytes of cache for {line['context']} "
                    f"tokens, {line['cache_allocated']} were allocated",
                    style="red",
                )
        self._show(report.table(self.results.lines))

    def _train(self, display: Display, jobs: dict[Job, Training]) -> None:
        waiting = list(jobs)
        work = partial(trainings.run, self.setup, self.text)
        for step in workers.run(work, [(training,) for training in jobs.values()], self.processes):
            job = waiting[step.job]
            if step.finished:
                self._keep([line for line in step.result if line not in self.results])
                display.finish(job, ", ".join(map(words, step.result)))
            else:
                display.update(job, step.done)

    def _training_job(self, training: Training) -> Job:
        setup = self.setup.text if training.kind == "text" else self.setup.tasks
        seconds = _training_seconds(setup.shape, setup.training.tokens) / self.processes
        return Job(
            f"{training.row} learns {'the text' if training.kind == 'text' else 'tasks'}, seed {training.seed}", seconds
        )

    def _keep(self, lines: list[Line]) -> None:
        self.results.add(lines)
        for line in lines:
            self._print_json(line)

    def _print_json(self, line: Line) -> None:
        if self.options.json:
            print(json.dumps(line), flush=True)

    def _show(self, what: RenderableType) -> None:
        """Something to read: not for those who asked for JSON."""
        if not self.options.json:
            self.console.print(what)


def _console(json: bool) -> Console:
    """Where people look; plain lines on standard error for those who asked for JSON."""
    if json:
        return Console(stderr=True, highlight=False, force_terminal=False, width=WIDTH)
    return Console(highlight=False, width=None if sys.stdout.isatty() else WIDTH)


def _kernel_job(case: bench.Case) -> Job:
    return Job(f"{case.id} {case.work}", KERNEL_SECONDS)


def _training_seconds(shape: Shape, tokens: int) -> float:
    """On one core; a token costs as much as its share of the parameters, and something for the rest."""
    weights = shape.layers * shape.width * (4 * shape.width + 3 * shape.hidden)
    return tokens * (weights + 4e5) / 1.9e10
