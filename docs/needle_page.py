"""Writes the table and the chart of the page "Retrieval" from the committed result lines of ``benchmarks.needle``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import vl_convert
from mechanism_pages import table

from attnkit import bench
from attnkit.bench import Line
from attnkit.report import charts

INK, SOFT = "#1b1f24", "#5a6470"


def write(results: Path, folder: Path) -> None:
    """Write ``results.md`` and ``needles.svg`` into ``folder`` from the newest file of needles under ``results``."""
    folder.mkdir(exist_ok=True)
    found = [lines for path in sorted(results.glob("*-needle.jsonl")) if len(lines := bench.read(path)) > 1]
    lines = found[-1] if found else []
    text = "\n".join(section(lines)) if lines else "No run is committed.\n"
    pieces = {"results.md": text}
    if lines:
        pieces["needles.svg"] = vl_convert.vegalite_to_svg(chart(lines), vl_version=charts.VEGA_LITE)
    for name, piece in pieces.items():
        path = folder / name
        if not path.exists() or path.read_text(encoding="utf-8") != piece:
            path.write_text(piece, encoding="utf-8")


def asked(lines: Sequence[Line]) -> dict[str, list[Line]]:
    """The answers of each cache, in the order of the file's first length."""
    found: dict[str, list[Line]] = {}
    for line in lines:
        if line["kind"] == "needle":
            found.setdefault(line["form"], []).append(line)
    return found


def lengths(lines: Sequence[Line]) -> list[int]:
    return sorted({line["tokens"] for line in lines if line["kind"] == "needle"})


def section(lines: Sequence[Line]) -> Iterator[str]:
    """What was measured and where, the chart, and the table of needles found."""
    run = lines[0]
    yield (
        f"{run['settings']['model']} in bfloat16 on {run['machine']['cpu']}, torch {run['torch']}, Transformers "
        f"{run['transformers']}, attnkit {run['attnkit']} at commit `{run['commit']}`, {run['started'][:10]}.\n"
    )
    yield f"![{chart(lines)['description']}](needle/needles.svg)\n"
    yield table(("cache", *(f"{n:,} tokens" for n in lengths(lines)), "MiB at its longest"), rows(lines))


def rows(lines: Sequence[Line]) -> Iterator[Sequence[str]]:
    """For each cache the needles found of those asked, and the digits that were right, by length; then its bytes."""
    for form, answers in asked(lines).items():
        cells = []
        for n in lengths(lines):
            here = [line for line in answers if line["tokens"] == n]
            right = f"{sum(line['digits'] for line in here)} of {5 * len(here)} digits"
            cells.append(f"{sum(line['found'] for line in here)} of {len(here)} ({right})" if here else "")
        most = max(answers, key=lambda line: line["tokens"])
        yield form, *cells, f"{most['bytes'] / 2**20:.1f}"


def chart(lines: Sequence[Line]) -> dict[str, Any]:
    """A grid of depth against length for each cache; a cell is as dark as digits were right."""
    grouped: dict[tuple[str, int, float], list[int]] = {}
    for form, answers in asked(lines).items():
        for line in answers:
            grouped.setdefault((form, line["tokens"], line["depth"]), []).append(line["digits"])
    values = [
        {"form": form, "tokens": f"{n:,}", "depth": f"{depth:.0%}", "digits": sum(digits) / len(digits)}
        for (form, n, depth), digits in grouped.items()
    ]
    axis = {"domain": False, "ticks": False, "labelColor": SOFT, "titleColor": SOFT, "titleFontWeight": 400}
    axis |= {"labelAngle": 0}
    x = {"field": "tokens", "type": "ordinal", "title": "tokens", "sort": [f"{n:,}" for n in lengths(lines)]}
    y = {"field": "depth", "type": "ordinal", "title": "depth", "sort": None}
    legend = {"title": "digits right of five", "orient": "bottom", "titleColor": SOFT, "titleFontWeight": 400}
    legend |= {"labelColor": INK, "gradientLength": 200, "values": [0, 1, 2, 3, 4, 5]}
    scale = {"domain": [0, 5], "range": ["#f3f5f8", charts.COLOURS[0][0]]}
    told = "; ".join(f"{row[0]} {row[-2]}" for row in rows(lines))
    return {
        "$schema": f"https://vega.github.io/schema/vega-lite/v{charts.VEGA_LITE.partition('.')[0]}.json",
        "description": f"Needles found by length and depth, at {lengths(lines)[-1]:,} tokens: {told}",
        "data": {"values": values},
        "padding": 12,
        "background": "#ffffff",  # readable on light and dark pages alike
        "columns": 4,
        "facet": {
            "field": "form",
            "type": "nominal",
            "sort": list(asked(lines)),
            "header": {"title": None, "labelColor": INK, "labelFontSize": 12, "labelAnchor": "start"},
        },
        "spec": {
            "width": 130,
            "height": 95,
            "mark": {"type": "rect", "stroke": "#ffffff", "strokeWidth": 2},
            "encoding": {
                "x": x | {"axis": axis},
                "y": y | {"axis": axis},
                "color": {"field": "digits", "type": "quantitative", "scale": scale, "legend": legend},
            },
        },
        "config": {"font": "Helvetica, Arial, DejaVu Sans, sans-serif", "view": {"stroke": None}},
    }
