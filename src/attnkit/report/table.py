"""The terminal's view of a run: the table of rows, the kernels, the masks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from rich import box
from rich.columns import Columns
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.measure import Measurement
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from attnkit.report import units
from attnkit.report.measures import Measure, backends, columns, token_bytes
from attnkit.report.results import Line, Picture, Results, joined, read

_MARKS = {"best": ("*", "bold green"), "tied": ("≈", "green"), "": (" ", "")}


class _Fitting:
    """The first of several renderables that fits the terminal, else the last."""

    def __init__(self, choices: Sequence[RenderableType]) -> None:
        self.choices = choices

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        *others, last = self.choices
        fits = (
            c for c in others if Measurement.get(console, options.update(width=10_000), c).maximum <= options.max_width
        )
        yield next(fits, last)


def table(lines: Iterable[Line]) -> RenderableType:
    """Every row with what was measured, for ``rich``; in two parts where the terminal is narrow.

    Parameters
    ----------
    lines : the JSON lines of a run, as dicts; what is missing yet shows as a dash.
    """
    results = read(lines)
    quality, cost = columns(results)
    if not quality and not cost:
        return Text("nothing was measured yet")
    wide = _rows(results, quality + cost, backend=True)
    parts: list[RenderableType] = [_rows(results, part, backend=False) for part in (quality, cost) if part]
    ran = Padding(Text(f"Backends: {_backends(results)}.", style="dim"), (0, 1))
    note = Padding(Text(legend(results), style="dim"), (0, 1))
    return Group(_Fitting([wide, Group(*parts, ran)]), note)


def _backends(results: Results) -> str:
    """Which rows ran on what: ``cpu, train sdpa`` alone where all did."""
    used: dict[str, list[str]] = {}
    for row in results.rows:
        used.setdefault(backends(row), []).append(row.label)
    return next(iter(used)) if len(used) == 1 else "; ".join(f"{ran} ({joined(rows)})" for ran, rows in used.items())


def legend(results: Results) -> str:
    """What the marks, the headings and the noise of the table are."""
    quality, cost = columns(results)
    measured = quality + cost
    marks = {measure.mark(row) for measure in measured for row in measure.samples}
    tasks = [measure for measure in quality if measure.name != "bits"]
    spread = any(s.spread is not None for measure in quality for s in measure.samples.values())
    margins = [f"{units.bits(m.margin)} bits per byte" for m in quality if m.name == "bits"]
    if tasks:
        margins.append(f"{units.rounded(100 * max(m.margin for m in tasks), 2)} points of accuracy")
    noise = [f"{joined(margins)} ({'from the seeds' if spread else 'assumed for one seed'})"] if margins else []
    noise += [f"{units.percent(results.timing)} of a time"] if cost else []
    return " ".join(
        [
            *(["* is best, beyond the noise."] if "best" in marks else []),
            *(["≈ cannot be distinguished from the best."] if "tied" in marks else []),
            f"Noise: {', '.join(noise)}.",
            *(["± is the standard deviation over seeds."] if spread else []),
            *([f"Under {joined([m.name for m in tasks])}: the length measured, then pairs."] if tasks else []),
        ]
    )


def _rows(results: Results, measures: Sequence[Measure], *, backend: bool) -> Table:
    grid = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True, header_style="bold")
    grid.add_column("row", no_wrap=True)
    for measure in measures:
        if measure.name == "cache":
            grid.add_column("cache\na token", justify="right", no_wrap=True)
        grid.add_column("\n".join(measure.heading), justify="right", no_wrap=True)
    if backend:
        grid.add_column("backend")
    for row in results.rows:
        cells: list[RenderableType] = [Text(row.label)]
        for measure in measures:
            if measure.name == "cache":
                cells.append(Text(token_bytes(row)))
            mark, style = _MARKS[measure.mark(row.id)]
            cells.append(Text(f"{measure.text(row.id)}{mark}", style))
        grid.add_row(*cells, *([Text(backends(row))] if backend else []))
    return grid


def kernel_table(lines: Iterable[Line]) -> RenderableType:
    """The machine's measured limits, and each native kernel beside torch's, for ``rich``."""
    results = read(lines)
    grid = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True, header_style="bold")
    grid.add_column("", no_wrap=True)
    grid.add_column("kernel", ratio=1)
    for heading in ("attnkit", "torch", "torch /\nattnkit", "of the\nlimit"):
        grid.add_column(heading, justify="right", no_wrap=True)
    for kernel in results.kernels:
        style = "" if kernel.meets_floors else "yellow"
        cells = (
            kernel.id,
            kernel.work,
            units.milliseconds(kernel.ours_ms),
            units.milliseconds(kernel.sdpa_ms),
            f"{units.rounded(kernel.ratio)}x{_below(kernel.ratio, kernel.floor_ratio)}" if kernel.ratio else "wrong ",
            "–" if kernel.share is None else f"{units.percent(kernel.share)}{_below(kernel.share, kernel.floor_share)}",
        )
        grid.add_row(*(Text(cell, style) for cell in cells))
    notes = [Text(text) for text in limits(results)]
    missed = any(not kernel.meets_floors for kernel in results.kernels)
    if missed:
        notes.append(Text("! below the floor that attnkit sets itself", style="yellow"))
    notes += [Text(f"{k.id} {k.work} is wrong: {k.wrong}", style="red") for k in results.kernels if k.wrong]
    return Group(*([grid] if results.kernels else []), *(Padding(note, (0, 1)) for note in notes))


def _below(value: float, floor: float | None) -> str:
    return "!" if floor is not None and value < floor else " "


def limits(results: Results) -> list[str]:
    """One sentence a limit of the machine, as measured in this run."""
    found = results.limits or {}
    named = (
        ("fma_gflops", "fp32 arithmetic", "GFLOP/s"),
        ("dot_gflops", "bf16 dot products", "GFLOP/s"),
        ("read_gbs", "memory reads", "GB/s"),
    )
    return [
        f"{name}: {joined([f'{units.rounded(value)} {unit} on {_threads(n)}' for n, value in found[key].items()])}"
        for key, name, unit in named
        if found.get(key)
    ]


def _threads(n: str) -> str:
    return "1 thread" if int(n) == 1 else f"{n} threads"


def pictures(lines: Iterable[Line]) -> RenderableType:
    """The masks side by side, for ``rich``: queries go down, keys go right, two queries to a line."""
    drawn = [picture for row in read(lines).rows for picture in row.pictures if picture.cells]
    if not drawn:
        return Text("no masks were drawn")
    note = "A query (going down) sees the keys (going right) that are filled; shaded: some of them."
    return Group(Columns([_picture(p) for p in drawn], padding=(1, 2)), Padding(Text(note, style="dim"), (0, 1)))


def _picture(picture: Picture) -> RenderableType:
    width = max(len(row) for row in picture.cells)
    title = Text(picture.title, "bold", no_wrap=True, overflow="ellipsis")
    title.truncate(width, overflow="ellipsis", pad=True)
    return Group(title, *(Text(line, "cyan") for line in _half_blocks(picture)))


def _half_blocks(picture: Picture) -> Iterator[str]:
    rows = list(picture.cells)
    if len(rows) % 2:
        rows.append((0,) * len(rows[-1]))
    blocks = {(0, 0): "·", (2, 2): "█", (2, 0): "▀", (0, 2): "▄"}
    for top, bottom in zip(rows[::2], rows[1::2], strict=True):
        yield "".join(blocks.get(pair, "▒") for pair in zip(top, bottom, strict=True))
