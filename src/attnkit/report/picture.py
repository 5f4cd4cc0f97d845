"""The static picture for a page that runs no scripts: quality against cache beside decode time."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from attnkit.compare.store import replace
from attnkit.report import charts
from attnkit.report.results import Line, read

_INK, _SOFT, _LINE, _GRID = "#1b1f24", "#5a6470", "#d9dee4", "#e9ecf0"
# A card of its own colour is readable on light and dark pages alike.
_CARD = {"background": "#ffffff", "padding": 20}


def picture(lines: Iterable[Line], path: str | Path) -> None:
    """Write the two charts that say most to ``path``, an SVG or, by its ending, a PNG.

    Raises ValueError where the lines have nothing to draw or the ending is another, ImportError where the drawing
    packages are missing, OSError where the file cannot be written.
    """
    path = Path(path)
    if path.suffix not in (".svg", ".png"):
        raise ValueError(f"the picture is {path.name}, expected a name that ends in .svg or .png")
    charts.require()
    import vl_convert

    results = read(lines)
    found = {figure.id: figure for figure in charts.figures(results)}
    drawn = [_panel(found[name]) for name in ("quality", "decode") if name in found]
    if not drawn:
        raise ValueError(
            "the results hold neither bits per byte with cache sizes nor decode times: nothing to draw yet"
        )
    params = found["decode" if "decode" in found else "quality"].spec["params"]
    spec = {"$schema": next(iter(found.values())).spec["$schema"], "params": params, "hconcat": drawn}
    # Frames on one height: beside each there is room for the names on its right and the next one's axis.
    spec |= {"bounds": "flush", "spacing": 215}
    spec |= _CARD | {"config": _config([light for light, _ in charts.COLOURS])}
    if path.suffix == ".svg":
        data = vl_convert.vegalite_to_svg(spec, vl_version=charts.VEGA_LITE).encode()
    else:
        data = vl_convert.vegalite_to_png(spec, vl_version=charts.VEGA_LITE, scale=2)
    replace(path, lambda part: part.write_bytes(data))


def _panel(figure: charts.Figure) -> dict[str, Any]:
    """One chart as a part of a row of charts, with its title, at a fixed width."""
    own = {name: value for name, value in figure.spec.items() if name not in _WHOLE_PAGE}
    return own | {"width": 330, "title": {"text": figure.title, "anchor": "start", "frame": "group", "offset": 14}}


_WHOLE_PAGE = ("$schema", "params", "autosize", "padding", "background", "datasets")


def _config(colours: list[str]) -> dict[str, Any]:
    axis: dict[str, Any] = {"domainColor": _LINE, "tickColor": _LINE, "gridColor": _GRID, "labelColor": _SOFT}
    axis |= {
        "titleColor": _SOFT,
        "labelFontSize": 12,
        "titleFontSize": 12,
        "titleFontWeight": 400,
        "titlePadding": 8,
        "labelOverlap": True,
    }
    return {
        "font": "Helvetica, Arial, DejaVu Sans, sans-serif",
        "range": {"category": colours},
        "view": {"stroke": None},
        "axis": axis,
        "axisX": {"grid": False},
        "title": {"fontSize": 16, "color": _INK},
        "style": {"name": {"color": _INK, "fontSize": 12}},
    }
