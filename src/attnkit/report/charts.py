"""The charts of the page, as Vega-Lite specifications: what is drawn where; colours come from the page's theme.

A row has the same colour and shape in every chart. Its name stands beside its line or point; names that would collide
are moved apart here, because heights are known before the browser lays anything out. Two parameters are set by the
page: ``chosen``, the row that the reader points at, and ``narrow``, true where there is no room for names.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import TYPE_CHECKING, Any

from attnkit.report import memory, units
from attnkit.report.measures import bits_per_byte, cache_context, cache_size
from attnkit.report.noise import Sample
from attnkit.report.results import Kernel, Results, Row, joined

if TYPE_CHECKING:
    import altair as alt

# Light and dark forms of a hue. Chosen by search so that any two stay apart, with red-green blindness too (by 0.098 or
# more in Oklab after Machado's simulation), and so that each has a contrast of 3.3 or more with its background.
COLOURS = (
    ("#1c3ec0", "#4f7dfc"),
    ("#ca270a", "#db4a32"),
    ("#108b70", "#93e3c9"),
    ("#fb40a0", "#986a7c"),
    ("#ba8307", "#f6b22e"),
    ("#7739fc", "#796ebd"),
    ("#8d1807", "#be8d83"),
    ("#094c62", "#7bc4e3"),
    ("#287634", "#94c997"),
    ("#911a86", "#c884bd"),
)
SHAPES = ("circle", "square", "triangle-up", "diamond", "cross", "triangle-down", "triangle-right")

VEGA_LITE = "6.4"
HEIGHT = 300
_LINE = 15
_FADE = "chosen == '' || chosen == datum.row"
_NAMES = f"!narrow && ({_FADE})"
_WIDE_RANGE = 20.0


@dataclass(frozen=True)
class Figure:
    """A chart with what the page says around it; ``description`` is read to those who cannot see it."""

    id: str
    title: str
    note: str
    description: str
    spec: dict[str, Any]


@dataclass(frozen=True)
class _Axis:
    """One direction of a chart. ``low`` and ``high`` bound it; ``ticks`` names the values that are labelled."""

    title: str
    low: float
    high: float
    log: bool = False
    ticks: tuple[float, ...] = ()
    format: str = ""
    label: str = ""

    def along(self, value: float) -> float:
        """Where ``value`` stands, 0 at ``low`` and 1 at ``high``."""
        low, high, value = (math.log(x) if self.log else x for x in (self.low, self.high, value))
        return (value - low) / (high - low)

    def at(self, place: float) -> float:
        """The value that stands at ``place``."""
        if self.log:
            return float(self.low * (self.high / self.low) ** place)
        return self.low + place * (self.high - self.low)

    def scale(self) -> alt.Scale:
        import altair as alt

        return alt.Scale(type="log" if self.log else "linear", domain=[self.low, self.high], nice=False)

    def axis(self) -> alt.Axis:
        import altair as alt

        options: dict[str, Any] = {"values": list(self.ticks)} if self.ticks else {"tickCount": 6}
        options |= {"labelExpr": self.label} if self.label else {}
        options |= {"format": self.format} if self.format else {}
        return alt.Axis(title=self.title, **options)


@dataclass(frozen=True)
class _Point:
    x: float
    y: float
    low: float
    high: float


def require() -> None:
    """Raise ImportError, in one sentence, where a package that draws is not installed."""
    try:
        import altair  # noqa: F401
        import jinja2  # noqa: F401
        import vl_convert  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"the report draws with {error.name}, which is not installed: pip install 'attnkit[compare]'",
            name=error.name,
        ) from error


def figures(results: Results) -> list[Figure]:
    """Every chart for which something was measured, in the order of the page."""
    recall = [*_recall(results), _state(results)]
    found = [_quality(results), _decoding(results), *recall, *_by_length(results), _learning(results)]
    return [figure for figure in found if figure is not None]


def style(rows: Sequence[Row]) -> list[tuple[tuple[str, str], str]]:
    """The light and dark colour, and the shape, of each row; a colour that comes again has another shape."""
    return [(COLOURS[i % len(COLOURS)], SHAPES[(i + i // len(COLOURS)) % len(SHAPES)]) for i, _ in enumerate(rows)]


def _quality(results: Results) -> Figure | None:
    bits, cache = bits_per_byte(results), cache_size(results)
    points = {
        row.label: [_point(cache.samples[row.id].mean, bits.samples[row.id])]
        for row in results.rows
        if row.id in bits.samples and row.id in cache.samples and cache.samples[row.id].mean > 0
    }
    if not points:
        return None
    x = _log_axis(f"cache of the model, bytes, at {cache_context(results)} tokens", _xs(points))
    x = replace(x, ticks=_powers(x, 4.0), label=_BYTES)
    y = _linear_axis("bits per byte of unseen text", points, margin=0.12)
    spread = "Bars: one standard deviation over seeds. " if bits.noise.spread is not None else ""
    told = [f"{row} {units.size(p.x)}, {units.bits(p.y)}" for row, (p,) in points.items()]
    return Figure(
        "quality",
        "Quality against cache",
        f"Lower is better, further left is smaller. {spread}Rows closer than {units.rounded(bits.margin, 2)} bits per "
        "byte are not told apart.",
        f"Bits per byte against cache size: {joined(told)}.",
        _chart(results, points, x, y, lines=False, shown=_BYTES_TIP),
    )


def _decoding(results: Results) -> Figure | None:
    points = {
        row.label: [_Point(context, ms, ms, ms) for context, ms in sorted(row.speed.decode.items())]
        for row in results.rows
        if row.speed and row.speed.decode
    }
    if not points:
        return None
    times = [p.y for series in points.values() for p in series]
    title = "milliseconds for one token"
    y = _log_axis(title, times) if max(times) > _WIDE_RANGE * min(times) else _Axis(title, 0, 1.08 * max(times))
    told = [f"{row} {units.milliseconds(series[-1].y)}" for row, series in points.items()]
    longest = max(_xs(points))
    return Figure(
        "decode",
        "Decode time against context",
        "One token with everything before it in the cache, batch 1. Lower is better.",
        f"Time of a decoded token against context, at {longest:.0f} tokens: {joined(told)}.",
        _chart(
            results, points, _counted_axis("tokens of context", points), y, shown=("context", ",d", "ms a token", ".3f")
        ),
    )


def _recall(results: Results) -> list[Figure]:
    lengths = sorted({place.length for place in results.places("recall")})
    return [figure for length in lengths if (figure := _recall_at(results, length))]


def _recall_at(results: Results, length: int) -> Figure | None:
    places = [place for place in results.places("recall") if place.length == length]
    points = _accuracies(results, "recall", {place: place.pairs or length for place in places})
    if not points:
        return None
    return Figure(
        f"recall-{length}",
        f"Recall against pairs, {length} tokens",
        "Share of keys whose value is given back, after so many pairs were read.",
        f"Recall at {length} tokens, at the most pairs: {_last_accuracies(points)}.",
        _chart(
            results,
            points,
            _counted_axis("pairs to remember", points),
            _SHARE,
            shown=("pairs", ",d", "accuracy", ".1%"),
        ),
    )


def _state(results: Results) -> Figure | None:
    found = memory.recall(results)
    if found is None:
        return None
    few, many = found.places
    points = {
        kept.row.label: [_Point(kept.bytes, kept.many.mean, *sorted((kept.few.mean, kept.many.mean)))]
        for kept in found.rows
        if kept.bytes
    }
    fixed = {kept.row.label for kept in found.rows if kept.fixed}
    x = _log_axis(f"state of one sequence of {many.length} tokens, bytes", _xs(points))
    told = [f"{row} {units.size(p.x)}, {units.percent(p.y)}" for row, (p,) in points.items()]
    return Figure(
        "recall-state",
        "Recall against state size",
        f"Marks: recall of {many.pairs} pairs. Bars end at that of {few.pairs} pairs, from the same state. Hollow: the "
        "state has a fixed size; the others grow with the sequence.",
        f"Recall of {many.pairs} pairs against bytes of state: {joined(told)}. Of fixed size: "
        f"{joined(sorted(fixed)) or 'none'}.",
        _chart(
            results,
            points,
            replace(x, ticks=_powers(x, 2.0), label=_BYTES),
            _SHARE,
            lines=False,
            hollow=fixed,
            shown=("state bytes", ",d", "recall", ".1%"),
        ),
    )


def _by_length(results: Results) -> list[Figure]:
    told = {
        "copy": ("Copying against length", "Share of tokens that are copied right."),
        "needle": ("Needle retrieval against length", "Share of needles found in a text of this length."),
    }
    found = []
    for task, (title, note) in told.items():
        points = _accuracies(results, task, {place: place.length for place in results.places(task)})
        if not points:
            continue
        x = _counted_axis("tokens", points)
        spec = _chart(results, points, x, _SHARE, shown=("tokens", ",d", "accuracy", ".1%"))
        found.append(Figure(task, title, note, f"{title}, at the longest: {_last_accuracies(points)}.", spec))
    return found


def _accuracies(results: Results, task: str, places: Mapping[Any, int]) -> dict[str, list[_Point]]:
    found = {
        row.label: [_point(x, Sample(tuple(v))) for place, x in places.items() if (v := row.accuracies(task, place))]
        for row in results.rows
    }
    return {row: points for row, points in found.items() if points}


def _last_accuracies(points: Mapping[str, Sequence[_Point]]) -> str:
    return joined([f"{row} {units.percent(series[-1].y)}" for row, series in points.items()])


def _learning(results: Results) -> Figure | None:
    points: dict[str, list[_Point]] = {}
    for row in results.rows:
        at: dict[float, list[float]] = {}
        for run in row.text.values():
            for tokens, bits in run.curve:
                at.setdefault(tokens, []).append(bits)
        if at:
            points[row.label] = [_Point(x, fmean(v), min(v), max(v)) for x, v in sorted(at.items())]
    if not points:
        return None
    end = max(_xs(points))
    # The first steps fall so far that they would press everything else flat.
    kept = [p for series in points.values() for p in series if p.x >= 0.25 * end]
    low, high = min(p.low for p in kept), max(p.high for p in kept)
    pad = 0.05 * (high - low) or 0.05 * high
    y = _Axis("bits per byte of unseen text", low - pad, high + pad)
    x = _Axis("tokens read in training", 0, end, label=_COUNT)
    several = "Line: mean over seeds, band: from the lowest to the highest seed. " if len(results.seeds) > 1 else ""
    return Figure(
        "learning",
        "Learning the text",
        f"{several}What lies above the frame at the start is cut off.",
        f"Bits per byte against tokens read, at the end: "
        f"{joined([f'{row} {units.bits(series[-1].y)}' for row, series in points.items()])}.",
        _chart(
            results,
            points,
            x,
            y,
            marks=False,
            band=len(results.seeds) > 1,
            shown=("tokens", ",d", "bits per byte", ".3f"),
        ),
    )


def kernels(results: Results) -> Figure | None:
    """Bars of the machine's limit that a kernel reaches, ours above torch's."""
    drawn = [kernel for kernel in results.kernels if kernel.share is not None and kernel.ratio]
    if not drawn:
        return None
    import altair as alt

    bars = [
        {"kernel": _named(k), "by": by, "share": share, "ms": ms}
        for k in drawn
        for by, share, ms in (("attnkit", k.share, k.ours_ms), ("torch", (k.share or 0) / (k.ratio or 1), k.sdpa_ms))
    ]
    names = [
        {"kernel": _named(k), "by": "", "text": f"{_named(k)}: {units.rounded(k.ratio or 0)}× torch", "zero": 0}
        for k in drawn
    ]
    floors = [
        {"kernel": _named(k), "by": "attnkit", "share": k.floor_share} for k in drawn if k.floor_share is not None
    ]
    top = max(1.0, *(float(bar["share"] or 0) for bar in bars))
    y = alt.Y("kernel:N", sort=None, axis=None, scale=alt.Scale(paddingInner=0.25, paddingOuter=0.05))
    offset = alt.YOffset("by:N", sort=None, scale=alt.Scale(domain=["", "attnkit", "torch"], paddingInner=0.12))
    x = alt.X(
        "share:Q",
        title="share of the machine's limit",
        scale=alt.Scale(domain=[0, 1.05 * top]),
        axis=alt.Axis(format=".0%", values=[0, 0.25, 0.5, 0.75, 1.0]),
    )
    tips = [alt.Tooltip("kernel:N"), alt.Tooltip("by:N"), alt.Tooltip("ms:Q", format=".3~r", title="ms")]
    tips.append(alt.Tooltip("share:Q", format=".1%", title="of the limit"))
    layers = []
    for by, look in (("attnkit", "ours"), ("torch", "theirs")):
        chosen = alt.Data(values=[bar for bar in bars if bar["by"] == by])
        bar = alt.Chart(chosen).mark_bar(style=look, cornerRadiusEnd=2)
        layers.append(bar.encode(x=x, y=y, yOffset=offset, tooltip=tips))
    layers.append(
        alt.Chart(alt.Data(values=names))
        .mark_text(align="left", baseline="middle", style="name", dy=2)
        .encode(x=alt.X("zero:Q"), y=y, yOffset=offset, text="text:N")
    )
    layers.append(alt.Chart(alt.Data(values=[{"share": 1}])).mark_rule(style="limit").encode(x=x))
    layers.append(
        alt.Chart(alt.Data(values=floors))
        .mark_tick(style="floor", thickness=3, bandSize=16, opacity=1)
        .encode(x=x, y=y, yOffset=offset)
    )
    chart = alt.layer(*layers).properties(width="container", height=62 * len(drawn))
    return Figure(
        "kernels",
        "Kernels against torch",
        "Upper bar: attnkit, lower: torch. The line at 100 % is what this machine can do, measured in the same run: "
        "arithmetic for prefill, memory for decoding. The short mark is the floor that attnkit sets itself.",
        f"Share of the machine's limit: {joined([_told(k) for k in drawn])}.",
        _finished(chart),
    )


def _named(kernel: Kernel) -> str:
    return f"{kernel.id}  {kernel.work}"


def _told(kernel: Kernel) -> str:
    share, ratio = units.percent(kernel.share or 0), units.rounded(kernel.ratio or 0)
    return f"{_named(kernel)} {share}, {ratio} times as fast as torch"


def _chart(
    results: Results,
    points: Mapping[str, Sequence[_Point]],
    x: _Axis,
    y: _Axis,
    *,
    shown: tuple[str, str, str, str],
    lines: bool = True,
    marks: bool = True,
    band: bool = False,
    hollow: Collection[str] = (),
) -> dict[str, Any]:
    """Rows as points, joined by lines or not, each with its name; ``shown`` names and formats x and y in tooltips.

    The marks of ``hollow`` rows are not filled.
    """
    import altair as alt

    labels = [row.label for row in results.rows]
    colour = alt.Color("row:N", scale=alt.Scale(domain=labels), legend=None)
    shape = alt.Shape("row:N", scale=alt.Scale(domain=labels, range=[s for _, s in style(results.rows)]), legend=None)
    across = alt.X("x:Q", scale=x.scale(), axis=x.axis())
    up = alt.Y("y:Q", scale=y.scale(), axis=y.axis())
    fade = alt.condition(_FADE, alt.value(1), alt.value(0.1))
    values = [
        {"row": row, "x": p.x, "y": p.y, "low": p.low, "high": p.high, "apart": p.high - p.low}
        for row, series in points.items()
        for p in series
    ]
    x_name, x_format, y_name, y_format = shown
    tips = [alt.Tooltip("row:N", title="row"), alt.Tooltip("x:Q", title=x_name, format=x_format)]
    tips += [alt.Tooltip("y:Q", title=y_name, format=y_format)]
    tips += [alt.Tooltip(f"{end}:Q", title=end, format=y_format) for end in ("low", "high") if band or _varies(points)]
    base = alt.Chart(alt.Data(values=values)).encode(color=colour, opacity=fade)
    layers = []
    if band:
        faint = alt.condition(_FADE, alt.value(0.16), alt.value(0.02))
        layers.append(
            base.mark_area(clip=True).encode(x=across, y=alt.Y("low:Q", scale=y.scale()), y2="high:Q", opacity=faint)
        )
    elif _varies(points):
        layers.append(base.mark_rule(strokeWidth=1.2).encode(x=across, y=alt.Y("low:Q", scale=y.scale()), y2="high:Q"))
    if lines:
        layers.append(base.mark_line(strokeWidth=2, clip=True).encode(x=across, y=up, tooltip=tips))
    if marks:
        solid = base.properties(data=alt.Data(values=[v for v in values if v["row"] not in hollow])) if hollow else base
        mark = solid.mark_point(filled=True, size=42 if lines else 110)
        layers.append(mark.encode(x=across, y=up, shape=shape, opacity=fade, tooltip=tips))
    if hollow:
        open_ones = base.properties(data=alt.Data(values=[v for v in values if v["row"] in hollow]))
        mark = open_ones.mark_point(filled=False, size=110, strokeWidth=2.2)
        layers.append(mark.encode(x=across, y=up, shape=shape, opacity=fade, tooltip=tips))
    named = alt.Chart(alt.Data(values=_names(points, x, y, scatter=not lines)))
    seen = alt.condition(_NAMES, alt.value(1), alt.value(0))
    at = {"x": across, "y": alt.Y("name_y:Q", scale=y.scale()), "opacity": seen}
    if lines:
        key = named.mark_point(filled=True, size=42, xOffset=14)
        layers.append(key.encode(color=colour, shape=shape, **at))
    text = named.mark_text(align="left", baseline="middle", style="name", dx=22 if lines else 11)
    # The layout makes room for names, so where they are not wanted there must be none.
    layers.append(text.encode(text=alt.condition("narrow", alt.value(""), "row:N"), **at))
    return _finished(alt.layer(*layers).properties(width="container", height=HEIGHT))


def _finished(chart: alt.LayerChart | alt.FacetChart) -> dict[str, Any]:
    """The specification with what every chart shares; without data that altair would name by its hash."""
    import altair as alt

    chart = chart.add_params(alt.param(name="chosen", value=""), alt.param(name="narrow", value=False))
    chart = chart.properties(
        autosize=alt.AutoSizeParams(type="fit-x", contains="padding"),
        padding={"left": 4, "right": 14, "top": 6, "bottom": 4},
        background="transparent",
    )
    # Altair has checked each part when it was made; checking the whole again takes longer than all the rest.
    spec: dict[str, Any] = chart.to_dict(validate=False)
    spec.pop("config", None)
    return spec


def _names(points: Mapping[str, Sequence[_Point]], x: _Axis, y: _Axis, *, scatter: bool) -> list[dict[str, Any]]:
    """A place for each row's name, beside its last point, moved up or down where names would collide."""
    ends = [(row, series[-1]) for row, series in points.items()]
    # Names of points far apart across the chart do not collide: each column is spread by itself.
    columns: dict[int, list[tuple[str, _Point]]] = {}
    for row, point in ends:
        columns.setdefault(round(4 * x.along(point.x)) if scatter else 0, []).append((row, point))
    found = []
    for members in columns.values():
        wanted = [HEIGHT * (1 - y.along(point.y)) for _, point in members]
        for (row, point), place in zip(members, spread(wanted, _LINE, 0, HEIGHT), strict=True):
            found.append({"row": row, "x": point.x, "name_y": y.at(1 - place / HEIGHT)})
    return found


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Positions as near to ``wanted`` as can be, in the same order, ``gap`` apart, between ``low`` and ``high``.

    Neighbours that would collide form a block around the mean of what they want; blocks merge until none collide.
    """
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    blocks: list[tuple[float, list[int]]] = []
    for i in order:
        block = [i]
        start = wanted[i]
        while blocks and blocks[-1][0] + gap * len(blocks[-1][1]) > start:
            block = blocks.pop()[1] + block
            start = fmean(wanted[j] - gap * k for k, j in enumerate(block))
            start = min(max(start, low), max(low, high - gap * (len(block) - 1)))
        blocks.append((min(max(start, low), max(low, high - gap * (len(block) - 1))), block))
    placed = {j: start + gap * k for start, block in blocks for k, j in enumerate(block)}
    return [placed[i] for i in range(len(wanted))]


def _point(x: float, sample: Sample) -> _Point:
    apart = sample.spread or 0.0
    return _Point(x, sample.mean, sample.mean - apart, sample.mean + apart)


def _varies(points: Mapping[str, Sequence[_Point]]) -> bool:
    return any(p.high > p.low for series in points.values() for p in series)


def _xs(points: Mapping[str, Sequence[_Point]]) -> list[float]:
    return [p.x for series in points.values() for p in series]


def _log_axis(title: str, values: Iterable[float]) -> _Axis:
    values = list(values)
    return _Axis(title, min(values) / 1.25, max(values) * 1.25, log=True)


def _counted_axis(title: str, points: Mapping[str, Sequence[_Point]]) -> _Axis:
    """Sizes that double: every measured one is labelled, as far as there is room."""
    sizes = sorted(set(_xs(points)))
    edge = 1.08 if len(sizes) > 1 else 1.5
    return _Axis(title, sizes[0] / edge, sizes[-1] * edge, log=True, ticks=tuple(sizes), format=",d")


def _linear_axis(title: str, points: Mapping[str, Sequence[_Point]], margin: float) -> _Axis:
    low = min(p.low for series in points.values() for p in series)
    high = max(p.high for series in points.values() for p in series)
    pad = margin * (high - low) or 0.02 * abs(high) or 1.0
    return _Axis(title, low - pad, high + pad)


def _powers(axis: _Axis, base: float) -> tuple[float, ...]:
    first, last = (math.log(end) / math.log(base) for end in (axis.low, axis.high))
    return tuple(base**k for k in range(math.ceil(first), math.floor(last) + 1))


_SHARE = _Axis("accuracy", -0.02, 1.03, ticks=(0.0, 0.25, 0.5, 0.75, 1.0), format=".0%")
_BYTES = (
    "datum.value >= 1073741824 ? format(datum.value / 1073741824, '~r') + ' GiB' : "
    "datum.value >= 1048576 ? format(datum.value / 1048576, '~r') + ' MiB' : "
    "datum.value >= 1024 ? format(datum.value / 1024, '~r') + ' KiB' : format(datum.value, '~r') + ' B'"
)
_BYTES_TIP = ("cache bytes", ",d", "bits per byte", ".3f")
_COUNT = "format(datum.value, '~s')"
