"""``attnkit bench``."""

from __future__ import annotations

import json as jsonlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from attnkit import bench
from attnkit.bench import Case, Line
from attnkit.bench.memory import works
from attnkit.cli.output import Json, StoppedError, console, table
from attnkit.registry import get, mechanisms


class Column(NamedTuple):
    """A column of the table; ``style`` empty takes that of the verdict, narrow terminals leave out what they can."""

    title: str
    style: str
    cell: Callable[[Line], str]
    from_width: int = 0


def _milliseconds(value: float) -> str:
    return f"{value:.3g} ms" if value < 1000 else f"{value:.0f} ms"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"


COLUMNS = (
    Column("", "default", lambda line: line["id"]),
    Column("work", "default", lambda line: line["work"]),
    Column("layer of", "default", lambda line: line["model"], from_width=140),
    Column("ours", "default", lambda line: _milliseconds(line["ours_ms"])),
    Column("torch", "default", lambda line: _milliseconds(line["sdpa_ms"])),
    Column("x torch", "", lambda line: "" if line["ratio"] is None else f"{line['ratio']:.2f}"),
    Column("floor", "dim", lambda line: f"{line['floor_ratio']:g}", from_width=110),
    Column("reached", "default", lambda line: f"{line['rate']:.3g} {line['unit']}", from_width=110),
    Column("of limit", "", lambda line: _percent(line["share"])),
    Column("floor", "dim", lambda line: _percent(line["floor_share"]), from_width=110),
    Column("", "", lambda line: "wrong" if line["wrong"] else "holds" if line["holds"] else "missed"),
)
NUMBERS = ("ours", "torch", "x torch", "floor", "reached", "of limit")


def verb(
    only: Annotated[str | None, typer.Option(help="Figures to measure, such as K1,K5; all if absent.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A few sizes of each figure: seconds, not minutes.")] = False,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads; torch's own number if absent.")] = None,
    flex: Annotated[bool, typer.Option("--flex", help="FlexAttention too: up to a minute a size to compile.")] = False,
    out: Annotated[Path | None, typer.Option(help="Results file; see below.")] = None,
    memory: Annotated[bool, typer.Option("--memory", help="Peak memory of each mechanism instead of times.")] = False,
    show: Annotated[Path | None, typer.Option(help="Print the table of this results file, measure nothing.")] = None,
    check: Annotated[bool, typer.Option("--check", help="Exit with 1 when a floor is missed.")] = False,
    json: Json = False,
) -> None:
    """Time the native kernels beside torch's, and beside the most that this machine can do.

    Every row times ours, torch's SDPA and the machine's limit in turn, at least seven times, after checking our result
    against the definition: a wrong result gets no speed. "x torch" is torch's time over ours, "of limit" our part of
    the limit: arithmetic for prefill, reading memory for decoding. Times are medians; a limit is the best seen. With
    one thread the clock counts processor time, which other programs on a busy machine disturb less.

    --memory asks each mechanism for 8,192 tokens in 8 heads of 64 in float32, forward and training, each in a process
    of its own, and shows the peak beside the 2 GiB that one table of all pairs takes; --only then names mechanisms.
    Recurrent ones train on 16,384 tokens as well, which may take half more than forward and a state every 64 tokens.

    A whole run is kept in benchmarks/results/DATE-LEVEL.jsonl in a source checkout, in attnkit-bench.jsonl elsewhere.
    With --quick or --only nothing is kept unless --out names a file. --json prints the same lines.

    Examples:

        attnkit bench --quick
        attnkit bench --only K5 --threads 1 --out decode.jsonl
        attnkit bench --memory --only path,castle
        attnkit bench --show benchmarks/results/2026-11-22-v4bf16.jsonl
    """
    path = None
    if show is not None:
        lines = bench.read(show)
        if not _rows(lines) or not {"limits", "memory"}.intersection(line["kind"] for line in lines):
            raise ValueError(f"{show} has no measured kernels, expected a results file of attnkit bench")
    else:
        names = [name.strip() for name in only.split(",")] if only is not None else []
        with _threads(threads or torch.get_num_threads()):
            if memory:
                path = _default_path("memory") if out is None and not names else out
                lines = _measure_memory(names, path)
            else:
                chosen = bench.cases([name.upper() for name in names], quick)
                path = _default_path() if out is None and not quick and not names else out
                lines = _measure(chosen, path, flex=flex)
    if json:
        for line in lines:
            print(jsonlib.dumps(line, ensure_ascii=False))
    else:
        _show(console(), lines)
        if path is not None:
            print(f"written to {path}")
    if check and not all(line["holds"] for line in _rows(lines)):
        raise typer.Exit(1)


def _default_path(what: str | None = None) -> Path:
    root, what = bench.checkout(), what or bench.machine()["level"]
    if root is None:
        return Path("attnkit-bench.jsonl")
    return root / "benchmarks" / "results" / f"{datetime.now(UTC):%Y-%m-%d}-{what}.jsonl"


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _measure(chosen: tuple[Case, ...], path: Path | None, *, flex: bool) -> list[Line]:
    weights = [(f"{case.id} {case.work}", case.expected_seconds) for case in chosen]
    return _kept(bench.run(chosen, flex=flex), path, "the machine's limits", weights)


def _measure_memory(names: list[str], path: Path | None) -> list[Line]:
    specs = [get(name) for name in names] or list(mechanisms().values())
    weights = [(f"{spec.name} {work}", 1.0) for spec in specs for work in works(spec)]
    return _kept(bench.peaks([spec.name for spec in specs]), path, "starting", weights)


def _kept(measured: Iterable[Line], path: Path | None, first: str, weights: Sequence[tuple[str, float]]) -> list[Line]:
    """The lines of a run, each in the file as soon as it is there; ``weights`` name the rows and their shares."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:.0f}%"),
        TimeRemainingColumn(),
    )
    screen = console(stderr=True)
    progress = Progress(*columns, console=screen, transient=True, disable=not screen.is_terminal)
    lines: list[Line] = []
    try:
        with bench.written(path) as write, progress:
            task = progress.add_task(first, total=sum(weight for _, weight in weights))
            for line in measured:
                write(line)
                lines.append(line)
                done = len(_rows(lines))
                progress.update(task, completed=sum(weight for _, weight in weights[:done]))
                if done < len(weights) and line["kind"] != "run":
                    progress.update(task, description=weights[done][0])
    except KeyboardInterrupt:
        kept = f"are in {bench.unfinished(path)}" if path else "were not kept, as no --out names a file"
        raise StoppedError(f"{len(_rows(lines))} finished rows {kept}") from None
    return lines


def _rows(lines: list[Line]) -> list[Line]:
    return [line for line in lines if line["kind"] in ("kernel", "memory")]


def _show(out: Console, lines: list[Line]) -> None:
    by_kind = {line["kind"]: line for line in lines}
    if "memory" in by_kind:
        _show_memory(out, lines)
        return
    out.print(_machine(by_kind["run"], by_kind["kernel"]["threads"]), markup=False)
    for sentence in _limits(by_kind["limits"]):
        out.print(sentence, markup=False)
    out.print()
    shown = [column for column in COLUMNS if out.width >= column.from_width]
    rows = table(*(column.title for column in shown), right=NUMBERS)
    for line in _rows(lines):
        style = "green" if line["holds"] else "red"
        rows.add_row(*(f"[{column.style or style}]{column.cell(line)}[/]" for column in shown))
    out.print(rows)
    out.print()
    for sentence in _conclusions(_rows(lines)):
        out.print(sentence, markup=False)


def _show_memory(out: Console, lines: list[Line]) -> None:
    rows = table("mechanism", "work", "tokens", "backend", "peak", "limit", "", right=("tokens", "peak", "limit"))
    for line in _rows(lines):
        style = "green" if line["holds"] else "red"
        verdict = "holds" if line["holds"] else "missed"
        peak, limit = f"{line['mib']:,.0f} MiB", f"{line['limit_mib']:,.0f} MiB"
        cells = line["mechanism"], line["work"], f"{line['n']:,}", line["backend"], peak, limit
        rows.add_row(*cells, f"[{style}]{verdict}[/]")
    out.print(_machine(lines[0], lines[0]["settings"]["threads"]), markup=False)
    out.print("one sequence in 8 heads of 64, float32", markup=False)
    if any(line["work"] == "recurrent training" for line in _rows(lines)):
        said = "recurrent training: gradients of arguments not counted; limit 1.5 x forward and a state every 64 tokens"
        out.print(said, markup=False)
    out.print()
    out.print(rows)


def _machine(run: Line, threads: int) -> str:
    where = run["machine"]
    commit = f", commit {run['commit']}" if run["commit"] else ""
    return (
        f"{where['cpu']}, {threads} of {where['cores']} cores, level {where['level']}; "
        f"torch {run['torch']}, attnkit {run['attnkit']}{commit}; {run['started'][:10]}"
    )


def _limits(line: Line) -> Iterator[str]:
    for name, unit, label in (
        ("fma_gflops", "GFLOP/s", "float32 multiply-adds"),
        ("dot_gflops", "GFLOP/s", "bfloat16 dot products"),
        ("read_gbs", "GB/s", "reading memory"),
    ):
        if line[name]:
            figures = ", ".join(f"{rate:g} {unit} on {count}" for count, rate in line[name].items())
            yield f"  limit of {label}: {figures}"


def _conclusions(rows: list[Line]) -> Iterator[str]:
    for line in rows:
        if line["wrong"]:
            yield f"{line['id']} {line['work']} is wrong, so it has no speed: {line['wrong']}"
    held = sum(line["holds"] for line in rows)
    yield f"{held} of {len(rows)} rows hold their floors."
    for line in rows:
        if line["flex_ms"]:
            yield f"{line['id']} {line['work']}: FlexAttention took {_milliseconds(line['flex_ms'])}"
    taken = max((line["others"] for line in rows), default=0)
    if taken > bench.QUIET:
        cure = "on an idle machine" if rows[0]["threads"] == 1 else "on an idle machine or with --threads 1"
        yield f"Other programs kept up to {taken:.1f} cores busy meanwhile, which lowers figures: measure again {cure}."
