"""``attnkit bench``."""

from __future__ import annotations

import json as jsonlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from attnkit import bench, native
from attnkit.advise.hardware import as_toml, here
from attnkit.bench import Case, Line
from attnkit.bench.base import compare
from attnkit.bench.memory import works
from attnkit.bench.peers import ENGINES, NAMES, require
from attnkit.cli.output import Json, StoppedError, console, emit, table
from attnkit.registry import get, mechanisms
from attnkit.testing import runs


class Column(NamedTuple):
    """A column of the table; ``style`` empty takes that of the verdict, narrow terminals leave out what they can."""

    title: str
    style: str
    cell: Callable[[Line], str]
    from_width: int = 0


def _milliseconds(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.3g} ms" if value < 1000 else f"{value:.0f} ms"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"


def _ratio(line: Line) -> str:
    return "" if line["ratio"] is None else f"{line['ratio']:.2f}"


def _bound(line: Line) -> str:
    """The floor of the ratio: at least where it says how much faster, at most where it says how much slower."""
    if line["floor_most"] is not None:
        return f"<= {line['floor_most']:g}"
    return "" if line["floor_ratio"] is None else f">= {line['floor_ratio']:g}"


def _verdict(line: Line) -> str:
    return "refused" if line["refused"] else "wrong" if line["wrong"] else "holds" if line["holds"] else "missed"


COLUMNS = (
    Column("", "default", lambda line: line["id"]),
    Column("work", "default", lambda line: line["work"]),
    Column("layer of", "default", lambda line: line["model"], from_width=160),
    Column("ours", "default", lambda line: _milliseconds(line["ours_ms"])),
    Column("beside", "default", lambda line: line["peer"] or "", from_width=120),
    Column("peer", "default", lambda line: _milliseconds(line["peer_ms"])),
    Column("ratio", "", _ratio),
    Column("floor", "dim", _bound, from_width=110),
    Column("reached", "default", lambda line: f"{line['rate']:.3g} {line['unit']}" if line["rate"] else "", 110),
    Column("of limit", "", lambda line: _percent(line["share"])),
    Column("floor", "dim", lambda line: _percent(line["floor_share"]), from_width=110),
    Column("", "", _verdict),
)
NUMBERS = ("ours", "peer", "ratio", "floor", "reached", "of limit")
STYLES = {"holds": "green", "refused": "yellow"}


def verb(
    suite: Annotated[str | None, typer.Option(help="Suites to measure: softmax,decode,latent,linear,sparse.")] = None,
    only: Annotated[str | None, typer.Option(help="Figures to measure, such as K1,K5; all if absent.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A few sizes of each figure: seconds, not minutes.")] = False,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads; torch's own number if absent.")] = None,
    level: Annotated[str | None, typer.Option(help="Instruction level to force, such as v3.")] = None,
    base: Annotated[str | None, typer.Option(help="Time this commit's kernels beside ours, in turn.")] = None,
    peers: Annotated[bool, typer.Option("--peers", help="ONNX Runtime and OpenVINO too: the extra [peers].")] = False,
    flex: Annotated[bool, typer.Option("--flex", help="FlexAttention too: up to a minute a size to compile.")] = False,
    out: Annotated[Path | None, typer.Option(help="Results file; see below.")] = None,
    memory: Annotated[bool, typer.Option("--memory", help="Peak memory of each mechanism instead of times.")] = False,
    show: Annotated[Path | None, typer.Option(help="Print the table of this results file, measure nothing.")] = None,
    check: Annotated[bool, typer.Option("--check", help="Exit with 1 when a floor is missed.")] = False,
    limits: Annotated[bool, typer.Option("--limits", help="The limits alone, as hardware for advise.")] = False,
    json: Json = False,
) -> None:
    """Time the native kernels beside their peers, and beside the most that this machine can do.

    Every row times ours, the peer and the machine's limit in turn, at least seven times, after checking our result
    against the definition: a wrong result gets no speed. A ratio with a floor (>=) is the peer's time over ours; one
    with a ceiling (<=) is our time over the part of the peer's that the work is of its work. "of limit" is our part of
    the limit: arithmetic for prefill, reading memory for decoding. Times are medians; a limit is the best seen. With
    one thread the clock counts processor time, which other programs on a busy machine disturb less. A row that cannot
    run says why.

    --base builds the kernels of another commit of this checkout and times both in turn, each in a process of its own.

    --memory asks each mechanism for 8,192 tokens in 8 heads of 64 in float32, forward and training, each in a process
    of its own, and shows the peak beside the 2 GiB that one table of all pairs takes; --only then names mechanisms.
    Recurrent ones train on 16,384 tokens as well, which may take half more than forward and a state every 64 tokens.

    A whole run is kept in benchmarks/results/DATE-LEVEL.jsonl in a source checkout, in attnkit-bench.jsonl elsewhere.
    With --quick, --suite, --only or --base nothing is kept unless --out names a file. --json prints the same lines.

    --limits prints arithmetic and reading memory alone, in the form that attnkit advise --hardware FILE.toml takes.

    Examples:

        attnkit bench --quick
        attnkit bench --limits > here.toml
        attnkit bench --only K5 --threads 1 --out decode.jsonl
        attnkit bench --suite decode,linear --level v3
        attnkit bench --only K1 --base HEAD~1
        attnkit bench --memory --only path,castle
        attnkit bench --show benchmarks/results/2026-11-22-v4bf16.jsonl
    """
    path = None
    if limits:
        with runs.threads(threads or torch.get_num_threads()), _level(level):
            found = here()
        emit({"kind": "limits", **asdict(found)}) if json else print(as_toml(found))
        return
    if show is not None:
        lines = bench.read(show)
        if not _rows(lines) or not {"limits", "memory", "pair"}.intersection(line["kind"] for line in lines):
            raise ValueError(f"{show} has no measured kernels, expected a results file of attnkit bench")
    else:
        names, wanted = _names(only), _names(suite)
        part = quick or bool(names or wanted)
        with runs.threads(threads or torch.get_num_threads()), _level(level):
            if memory:
                path = _default_path("memory") if out is None and not names else out
                lines = _measure_memory(names, path)
            else:
                chosen = bench.cases([name.upper() for name in names], quick, wanted)
                others = [*(("flex",) if flex else ()), *(ENGINES if peers else ())]
                require(others)
                if base is not None:
                    path = out
                    lines = _compare(chosen, base, path)
                else:
                    path = _default_path() if out is None and not part else out
                    lines = _measure(chosen, path, others)
    if json:
        for line in lines:
            print(jsonlib.dumps(line, ensure_ascii=False))
    else:
        _show(console(), lines)
        if path is not None:
            print(f"written to {path}")
    held = [line["holds"] for line in _rows(lines)] + [one.holds for one in bench.exponents(lines)]
    if check and not all(held):
        raise typer.Exit(1)


def _default_path(what: str | None = None) -> Path:
    root, what = bench.checkout(), what or bench.machine()["level"]
    if root is None:
        return Path("attnkit-bench.jsonl")
    return root / "benchmarks" / "results" / f"{datetime.now(UTC):%Y-%m-%d}-{what}.jsonl"


@contextmanager
def _level(name: str | None) -> Iterator[None]:
    if name is None:
        yield
        return
    with native.use_level(name):
        yield


def _names(text: str | None) -> list[str]:
    return [] if text is None else [name.strip() for name in text.split(",")]


def _measure(chosen: tuple[Case, ...], path: Path | None, others: Sequence[str]) -> list[Line]:
    return _kept(bench.run(chosen, others=others), path, "the machine's limits", _weights(chosen))


def _compare(chosen: tuple[Case, ...], base: str, path: Path | None) -> list[Line]:
    return _kept(compare(chosen, base), path, f"building {base}", _weights(chosen))


def _weights(chosen: tuple[Case, ...]) -> list[tuple[str, float]]:
    return [(f"{case.id} {case.work}", case.expected_seconds) for case in chosen]


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
    return [line for line in lines if line["kind"] in ("kernel", "memory", "pair")]


def _show(out: Console, lines: list[Line]) -> None:
    by_kind = {line["kind"]: line for line in lines}
    if "memory" in by_kind or "pair" in by_kind:
        (_show_memory if "memory" in by_kind else _show_pairs)(out, lines)
        return
    out.print(_machine(by_kind["run"], by_kind["kernel"]["threads"]), markup=False)
    for sentence in _limits(by_kind["limits"]):
        out.print(sentence, markup=False)
    out.print()
    shown = [column for column in COLUMNS if out.width >= column.from_width]
    rows = table(*(column.title for column in shown), right=NUMBERS)
    for line in _rows(lines):
        style = STYLES.get(_verdict(line), "red")
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


def _show_pairs(out: Console, lines: list[Line]) -> None:
    base = lines[0]["settings"]["base"]
    rows = table("", "work", base, "here", "old / new", "spread", right=(base, "here", "old / new", "spread"))
    for line in _rows(lines):
        if line["refused"]:
            rows.add_row(line["id"], line["work"], "", "", "refused")
            continue
        times = _milliseconds(line["old_ms"]), _milliseconds(line["new_ms"])
        rows.add_row(line["id"], line["work"], *times, f"{line['ratio']:.3f}", _percent(line["spread"]))
    out.print(_machine(lines[0], lines[0]["settings"]["threads"]), markup=False)
    out.print()
    out.print(rows)
    _refusals(out, _rows(lines))


def _refusals(out: Console, rows: list[Line]) -> None:
    for line in rows:
        if line["refused"]:
            out.print(f"{line['id']} {line['work']} refused: {line['refused']}", markup=False)


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
        if line["refused"]:
            yield f"{line['id']} {line['work']} refused: {line['refused']}"
    for one in bench.exponents(rows):
        verdict = "holds" if one.holds else "missed"
        bound = f"1 +- {one.within:g}"
        yield f"{one.id} {one.work}: time grows with n to the power {one.exponent:.2f}, expected {bound}: {verdict}"
    held, measured = sum(line["holds"] for line in rows), sum(not line["refused"] for line in rows)
    yield f"{held} of {measured} rows hold their floors."
    for line in rows:
        for name, took in (line["also_ms"] or {}).items():
            yield f"{line['id']} {line['work']}: {NAMES[name]} took {_milliseconds(took)}"
    taken = max((line["others"] for line in rows), default=0)
    if taken > bench.QUIET:
        cure = "on an idle machine" if rows[0]["threads"] == 1 else "on an idle machine or with --threads 1"
        yield f"Other programs kept up to {taken:.1f} cores busy meanwhile, which lowers figures: measure again {cure}."
