"""What parity found as one HTML file that needs nothing else, in the style of the report of ``attnkit compare``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from attnkit.compare.store import replace
from attnkit.parity.record import Row, Verdict
from attnkit.parity.table import by_line, sentences, share
from attnkit.report import charts

_CLASSES = {Verdict.SAME: "right", Verdict.ROUNDING: "right", Verdict.CHANGED: "wrong", Verdict.REFUSED: "refused"}


def write_html(rows: Sequence[Row], facts: Mapping[str, str], path: Path) -> None:
    """Write the report to ``path``: all of it, or nothing and what was there before stays.

    facts: what was run, for people, by name; ``model`` among them. Raises OSError where the file cannot be written.
    """
    text = page(rows, facts)
    replace(path, lambda part: part.write_text(text, encoding="utf-8"))


def page(rows: Sequence[Row], facts: Mapping[str, str]) -> str:
    """The HTML text of the report."""
    import jinja2

    environment = jinja2.Environment(autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined)
    style = (files("attnkit.report") / "page" / "page.css").read_text("utf-8")
    changed = sum(row.finding.verdict is Verdict.CHANGED for row in rows)
    found = f"{changed} of {len(rows)} checks found a change" if changed else "nothing changed"
    return environment.from_string((files("attnkit.parity") / "page.html").read_text("utf-8")).render(
        title=f"{facts['model']}: {found}",
        facts=facts,
        css=environment.filters["safe"](style),
        colours=charts.COLOURS,
        backends=list(dict.fromkeys(row.lane.backend for row in rows)),
        lines=[_line(name, cache, found) for (name, cache), found in by_line(rows).items()],
        sentences=[(_CLASSES[verdict], text) for verdict, text in sentences(rows)],
    )


def _line(name: str, cache: str | None, found: Mapping[str, Row]) -> dict[str, Any]:
    first = next(iter(found.values()))
    cells = {
        backend: {
            "verdict": row.finding.verdict.value,
            "kind": _CLASSES.get(row.finding.verdict, "nothing"),
            "share": share(row.finding),
            "says": row.finding.says,
            "layer": row.finding.layer or "",
        }
        for backend, row in found.items()
    }
    return {"name": name, "measures": first.check.measures, "cache": cache or "", "cells": cells}
