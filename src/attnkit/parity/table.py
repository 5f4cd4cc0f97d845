"""What parity found, for the terminal and for machines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from attnkit.parity.record import Row, Verdict
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
    lines: dict[tuple[str, str | None], dict[str, Row]] = {}
    for row in rows:
        lines.setdefault((row.check.name, row.lane.cache), {})[row.lane.backend] = row
    for (name, cache), found in lines.items():
        grid.add_row(name, cache or "", *(_cell(found[backend]) for backend in backends))
    said = [Padding(Text(text, _STYLES[verdict]), (0, 1)) for verdict, text in sentences(rows)]
    return Group(grid, *said)


def sentences(rows: Sequence[Row]) -> list[tuple[Verdict, str]]:
    """What a reader needs to be told: what changed first, then what was refused; equal reasons once."""
    said: dict[tuple[Verdict, str], list[str]] = {}
    for verdict in (Verdict.CHANGED, Verdict.REFUSED):
        for row in rows:
            if row.finding.verdict is verdict:
                layer = f" from {row.finding.layer} on" if row.finding.layer else ""
                said.setdefault((verdict, f"{verdict}{layer}. {row.finding.says}"), []).append(_asked(row))
    return [(verdict, f"{'; '.join(asked)}: {text}") for (verdict, text), asked in said.items()]


def _asked(row: Row) -> str:
    cache = f" with the {row.lane.cache} cache" if row.lane.cache else ""
    return f"{row.check.name}, {row.lane.backend}{cache}"


def _cell(row: Row) -> Text:
    share = row.finding.share
    used = f" {units.percent(share)} of the budget" if share and row.finding.verdict is Verdict.ROUNDING else ""
    return Text(f"{row.finding.verdict}{used}", _STYLES[row.finding.verdict])


def as_json(row: Row) -> dict[str, Any]:
    """One finding as a JSON object; a share past all bounds is null."""
    finding = row.finding
    share = finding.share if finding.share is None or finding.share < float("inf") else None
    return {
        "check": row.check.name,
        "measures": row.check.measures,
        "backend": row.lane.backend,
        "cache": row.lane.cache,
        "verdict": finding.verdict.value,
        "layer": finding.layer,
        "share": share,
        "says": finding.says,
        "figures": dict(finding.figures),
    }
