"""The report as one HTML file that needs nothing else: its numbers, charts, styles and scripts are inside."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Iterator
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from attnkit.compare.store import replace
from attnkit.report import charts, units
from attnkit.report.measures import Measure, backends, columns, token_bytes
from attnkit.report.results import Kernel, Line, Picture, Results, read
from attnkit.report.table import legend, limits
from attnkit.report.words import paragraphs

# The name of the text that is read when a user names none.
_OWN_TEXT = "Shakespeare's plays"
_MARKS = {"best": "best, beyond the noise", "tied": "cannot be distinguished from the best"}
# What Vega draws for a shape's name, in a box of 12 by 12 around the origin.
_PATHS = {
    "circle": "M5 0A5 5 0 1 1 -5 0A5 5 0 1 1 5 0Z",
    "square": "M-4.5-4.5h9v9h-9Z",
    "triangle-up": "M0-5L5 4H-5Z",
    "diamond": "M0-5.5L5.5 0L0 5.5L-5.5 0Z",
    "cross": "M-1.8-5.4h3.6v3.6h3.6v3.6h-3.6v3.6h-3.6v-3.6h-3.6v-3.6h3.6Z",
    "triangle-down": "M0 5L5-4H-5Z",
    "triangle-right": "M5 0L-4-5V5Z",
}


def write_html(lines: Iterable[Line], path: str | Path) -> None:
    """Write the report to ``path``: all of it, or nothing and what was there before stays.

    Parameters
    ----------
    lines : the JSON lines of a run, as dicts; of an unfinished run too.
    path : the file to write.

    Raises ImportError where the drawing packages are missing, OSError where the file cannot be written, and ValueError
    for lines that cannot be read; each in one sentence.
    """
    text = page(list(lines))
    replace(Path(path), lambda part: part.write_text(text, encoding="utf-8"))


def page(lines: list[Line]) -> str:
    """The HTML text of the report."""
    charts.require()
    import jinja2

    results = read(lines)
    quality, cost = columns(results)
    figures = charts.figures(results)
    kernel_figure = charts.kernels(results)
    drawn = [*figures, *([kernel_figure] if kernel_figure else [])]
    own = files("attnkit.report") / "page"
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined)
    asset = environment.filters["safe"]
    return environment.from_string((own / "page.html").read_text("utf-8")).render(
        title=_title(results),
        facts=_facts(results),
        colours=charts.COLOURS,
        css=asset((own / "page.css").read_text("utf-8")),
        js=asset((own / "page.js").read_text("utf-8")),
        vega=asset(_vega()) if drawn else "",
        paragraphs=[_unbroken(text) for text in paragraphs(lines)],
        legend=legend(results),
        marks=_MARKS,
        head=[heading for measure in quality + cost for heading in _headings(measure)],
        rows=[_row(results, i, quality + cost) for i in range(len(results.rows))],
        styles=[
            {"colour": i % len(charts.COLOURS), "path": _PATHS[shape]}
            for i, (_, shape) in enumerate(charts.style(results.rows))
        ],
        figures=figures,
        kernel_figure=kernel_figure,
        specs={figure.id: {"spec": figure.spec} for figure in drawn},
        kernels=[_kernel(kernel) for kernel in results.kernels],
        limits=limits(results),
        masks=[
            _mask(picture, i % len(charts.COLOURS))
            for i, row in enumerate(results.rows)
            for picture in row.pictures
            if picture.cells
        ],
        setting=list(_setting(results)),
        command=command(results),
    )


@cache
def _vega() -> str:
    """The scripts that draw, 0.9 MB; putting them together takes seconds."""
    import vl_convert

    return vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;", vl_version=charts.VEGA_LITE)


def _unbroken(text: str) -> str:
    """The text with each number kept on one line with its unit."""
    return re.sub(r"(\d) (%|[KMG]?i?B\b|ms\b|GFLOP/s|GB/s)", "\\1\N{NO-BREAK SPACE}\\2", text)


def _title(results: Results) -> str:
    text = results.settings.get("text")
    return f"Attention compared on {text}" if text else "Attention compared"


def _facts(results: Results) -> list[str]:
    machine, seeds = results.machine, len(results.seeds)
    return [
        f"{len(results.rows)} rows",
        f"{seeds} seed{'' if seeds == 1 else 's'}",
        *([str(machine["cpu"])] if machine.get("cpu") else []),
        *([f"{machine['cores']} cores"] if machine.get("cores") else []),
        *([str(results.run["started"])[:10]] if results.run.get("started") else []),
    ]


def _headings(measure: Measure) -> list[tuple[str, str]]:
    return [("cache", "a token"), measure.heading] if measure.name == "cache" else [measure.heading]


def _row(results: Results, index: int, measures: list[Measure]) -> dict[str, Any]:
    row = results.rows[index]
    cells: list[dict[str, str]] = []
    for measure in measures:
        if measure.name == "cache":
            cells.append({"text": token_bytes(row), "spread": "", "mark": ""})
        text, _, spread = measure.text(row.id).partition(" ± ")
        mark = measure.mark(row.id) if row.id in measure.samples else ""
        cells.append({"text": text, "spread": spread, "mark": mark})
    return {"index": index, "label": row.label, "title": row.title, "cells": cells, "backends": backends(row)}


def _kernel(kernel: Kernel) -> dict[str, str]:
    return {
        "name": f"{kernel.id}  {kernel.work}",
        "ours": units.rounded(kernel.ours_ms),
        "theirs": units.rounded(kernel.sdpa_ms),
        "ratio": "wrong" if kernel.ratio is None else units.rounded(kernel.ratio),
        "floor_ratio": "" if kernel.floor_ratio is None else units.rounded(kernel.floor_ratio),
        "share": "–" if kernel.share is None else units.percent(kernel.share),
        "floor_share": "" if kernel.floor_share is None else units.percent(kernel.floor_share),
    }


def _mask(picture: Picture, colour: int) -> dict[str, Any]:
    """A mask as runs of equal cells ``(x, y, width, level)``: a row of 24 cells is seldom more than three of them."""
    runs: list[tuple[int, int, int, int]] = []
    for y, cells in enumerate(picture.cells):
        start = 0
        for x in range(1, len(cells) + 1):
            if x == len(cells) or cells[x] != cells[start]:
                if cells[start]:
                    runs.append((start, y, x - start, cells[start]))
                start = x
    width, height = max(len(cells) for cells in picture.cells), len(picture.cells)
    seen = sum(level > 0 for cells in picture.cells for level in cells) / (width * height)
    return {
        "title": picture.title,
        "alt": f"{picture.title}: mask of {picture.n} queries by {picture.n} keys, {units.percent(seen)} of it seen",
        "width": width,
        "height": height,
        "runs": runs,
        "colour": colour,
    }


def _setting(results: Results) -> Iterator[tuple[str, str]]:
    settings, machine, run = results.settings, results.machine, results.run
    bytes_read = settings.get("bytes")
    facts = {
        "text": settings.get("text"),
        "size of the text": units.size(float(bytes_read)) if bytes_read else None,
        "tokenizer": settings.get("tokenizer"),
        "seeds": ", ".join(map(str, results.seeds)),
        "run": None if settings.get("quick") is None else "quick" if settings["quick"] else "full",
        "processor": machine.get("cpu"),
        "cores": machine.get("cores"),
        "instruction level": machine.get("level"),
        "system": machine.get("system"),
        "attnkit": run.get("attnkit"),
        "commit": run.get("commit"),
        "torch": run.get("torch"),
        "Python": run.get("python"),
        "started": run.get("started"),
    }
    known = set(facts) | {"bytes", "quick", "rows", "seeds"}
    facts |= {name.replace("_", " "): value for name, value in settings.items() if name not in known}
    for name, value in facts.items():
        if value is not None and value != "":
            yield name, str(value)


def command(results: Results) -> str:
    """What to type to run this again, with every choice named."""
    settings = results.settings
    text = str(settings.get("text") or _OWN_TEXT)
    words = ["attnkit", "compare", *(["--quick"] if settings.get("quick") else [])]
    words += [word for name in text.split(", ") for word in ("--text", name)] if text != _OWN_TEXT else []
    words += ["--mechanisms", ",".join(row.id for row in results.rows)] if results.rows else []
    words += ["--seeds", ",".join(map(str, results.seeds))] if results.seeds else []
    words += ["--tokenizer", str(settings["tokenizer"])] if settings.get("tokenizer") else []
    return shlex.join(words)
