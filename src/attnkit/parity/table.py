"""What parity found, for the terminal and for machines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from attnkit.parity.record import Finding, Row, Verdict
from attnkit.report import units

_STYLES = {
    Verdict.SAME: "green",
    Verdict.ROUNDING: "green",
    Verdict.CHANGED: "bold red",
    Verdict.REFUSED: "yellow",
    Verdict.NOTHING: "dim",
}


def table(rows: Sequence[Row]) -> RenderableType:
    """A line for each check and cache, a column for each backend, and below what was wrong or refused."""
    backends = list(dict.fromkeys(row.lane.backend for row in rows))
    grid = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    for heading in ("check", "cache", *backends):
        grid.add_column(heading, no_wrap=True)
    for (name, cache), found in by_line(rows).items():
        grid.add_row(name, cache or "", *(_cell(found[backend]) for backend in backends))
    said = [Padding(Text(text, _STYLES[verdict]), (0, 1)) for verdict, text in sentences(rows)]
    return Group(grid, *said)


def sentences(rows: Sequence[Row]) -> list[tuple[Verdict, str]]:
    """What a reader needs to be told: what changed first, then what was refused; equal reasons once."""
    said: dict[tuple[Verdict, str, str], list[Row]] = {}
    for verdict in (Verdict.CHANGED, Verdict.REFUSED):
        for row in rows:
            if row.finding.verdict is verdict:
                layer = f" from {row.finding.layer} on" if row.finding.layer else ""
                said.setdefault((verdict, row.lane.backend, f"{layer}. {row.finding.says}"), []).append(row)
    return [
        (verdict, f"{backend}, {_asked(found, rows)}: {verdict}{text}")
        for (verdict, backend, text), found in said.items()
    ]


def _asked(found: Sequence[Row], rows: Sequence[Row]) -> str:
    """The checks of some rows of one backend in a few words."""
    if len(found) == sum(row.lane.backend == found[0].lane.backend for row in rows):
        return "every check"
    caches: dict[str, list[str]] = {}
    for row in found:
        caches.setdefault(row.check.name, []).extend([row.lane.cache] if row.lane.cache else [])
    return ", ".join(f"{name} ({', '.join(held)})" if held else name for name, held in caches.items())


def by_line(rows: Sequence[Row]) -> dict[tuple[str, str | None], dict[str, Row]]:
    """Rows by check and cache, then by backend."""
    lines: dict[tuple[str, str | None], dict[str, Row]] = {}
    for row in rows:
        lines.setdefault((row.check.name, row.lane.cache), {})[row.lane.backend] = row
    return lines


def share(finding: Finding) -> str:
    """The part of the budget that was used, where one was."""
    return units.percent(finding.share) if finding.share and finding.verdict is Verdict.ROUNDING else ""


def _cell(row: Row) -> Text:
    used = f" {part} of the budget" if (part := share(row.finding)) else ""
    return Text(f"{row.finding.verdict}{used}", _STYLES[row.finding.verdict])


def as_json(row: Row) -> dict[str, Any]:
    """One finding as a JSON object; a share past all bounds is null."""
    finding = row.finding
    finite = finding.share is None or finding.share < float("inf")
    return {
        "check": row.check.name,
        "measures": row.check.measures,
        "backend": row.lane.backend,
        "cache": row.lane.cache,
        "verdict": finding.verdict.value,
        "layer": finding.layer,
        "share": finding.share if finite else None,
        "says": finding.says,
        "figures": dict(finding.figures),
    }
