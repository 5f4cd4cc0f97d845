"""Writes the tables and charts of the page "Speed" from the result lines of ``attnkit bench`` that are committed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import vl_convert
from mechanism_pages import table

from attnkit import bench
from attnkit.bench import Line
from attnkit.report import charts

SUITES = {
    "softmax": "Softmax attention of a prompt, forward and backward",
    "decode": "Decoding one token",
    "latent": "Latent attention",
    "linear": "Linear attention and delta rules",
    "sparse": "Learned-sparse attention of 32,768 tokens",
}
HEAD = (
    "",
    "work",
    "layer of",
    "ours",
    "beside",
    "its time",
    "ratio",
    "floor",
    "of limit",
    "floor",
    "ratio at the limit",
    "",
)
INK, SOFT, GRID = "#1b1f24", "#5a6470", "#e9ecf0"


@dataclass
class Machine:
    """A processor at one instruction level and number of threads: its newest row of each piece of work."""

    run: Line
    limits: Line
    rows: dict[tuple[str, str], Line] = field(default_factory=dict)

    @property
    def title(self) -> str:
        threads = next(iter(self.rows.values()))["threads"]
        return f"{self.run['machine']['cpu']}, level {self.run['machine']['level']}, {threads} threads"


def write(results: Path, folder: Path) -> None:
    """Write ``results.md`` and its charts into ``folder`` from the ``*.jsonl`` files under ``results``."""
    folder.mkdir(exist_ok=True)
    texts = {}
    found = list(machines(bench.read(path) for path in sorted(results.glob("*.jsonl"))))
    for number, machine in enumerate(found):
        for name, spec in pictures(machine):
            texts[f"{number}-{name}.svg"] = vl_convert.vegalite_to_svg(spec, vl_version=charts.VEGA_LITE)
    texts["results.md"] = "\n".join(part for number, one in enumerate(found) for part in section(number, one))
    for path in folder.iterdir():
        if path.name not in texts:
            path.unlink()
    for name, text in texts.items():
        path = folder / name
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")


def machines(files: Iterable[Sequence[Line]]) -> list[Machine]:
    """Machines in the order of their newest file, from files of the bench; those of other tools are passed over."""
    found: dict[tuple[Any, ...], Machine] = {}
    for lines in sorted(files, key=lambda lines: str(lines[0].get("started"))):
        kinds = {line["kind"] for line in lines}
        if kinds != {"run", "limits", "kernel"}:
            continue
        run, rows = lines[0], [line for line in lines if line["kind"] == "kernel"]
        key = (run["machine"]["cpu"], run["machine"]["level"], rows[0]["threads"])
        kept = found.pop(key).rows if key in found else {}
        limits = next(line for line in lines if line["kind"] == "limits")
        found[key] = Machine(run, limits, kept | {(line["id"], line["work"]): line for line in rows})
    return list(reversed(found.values()))


def section(number: int, machine: Machine) -> Iterator[str]:
    """What was measured on one machine: where, limits, and a table, charts and what is short for each suite."""
    run = machine.run
    yield f"## {machine.title}\n"
    yield (
        f"{run['machine']['cores']} cores, {run['machine']['system']}; torch {run['torch']}, Python {run['python']}, "
        f"attnkit {run['attnkit']} at commit `{run['commit']}`, {run['started'][:10]}. "
        f"Limits: {limits(machine.limits)}.\n"
    )
    for suite, title in SUITES.items():
        rows = [line for line in machine.rows.values() if line["suite"] == suite]
        if not rows:
            continue
        yield f"### {title}\n"
        yield table(HEAD, [cells(line) for line in rows if not line["refused"]])
        drawn = [(name, spec) for name, spec in pictures(machine) if name.startswith(f"{suite}-")]
        if drawn:
            yield " ".join(f"![{spec['description']}](speed/{number}-{name}.svg)" for name, spec in drawn) + "\n"
        yield "\n".join(f"- {sentence}" for sentence in conclusions(rows)) + "\n"


def limits(line: Line) -> str:
    said = []
    for name, unit, what in (
        ("fma_gflops", "GFLOP/s", "float32 multiply-adds"),
        ("dot_gflops", "GFLOP/s", "bfloat16 dot products"),
        ("read_gbs", "GB/s", "reading memory"),
    ):
        if line[name]:
            threads, best = max(line[name].items(), key=lambda pair: int(pair[0]))
            said.append(f"{best:g} {unit} of {what} on {threads} threads")
    return ", ".join(said)


def cells(line: Line) -> Iterable[str]:
    least, most = line["floor_ratio"], line["floor_most"]
    ratio = "" if line["ratio"] is None else f"{line['ratio']:.2f}"
    best = at_limit(line)
    return (
        line["id"],
        line["work"],
        line["model"],
        milliseconds(line["ours_ms"]),
        line["peer"] or "",
        milliseconds(line["peer_ms"]),
        ratio,
        f"≥ {least:g}" if least is not None else f"≤ {most:g}" if most is not None else "",
        percent(line["share"]),
        percent(line["floor_share"]),
        "" if best is None else f"{best:.2f}",
        "wrong" if line["wrong"] else "holds" if line["holds"] else "missed",
    )


def at_limit(line: Line) -> float | None:
    """How many times as fast as the peer a kernel would be that reached all of the limit."""
    if not line["ratio"] or not line["share"] or line["floor_most"] is not None:
        return None
    return float(line["ratio"] / line["share"])


def conclusions(rows: Sequence[Line]) -> Iterator[str]:
    """What holds, and for what does not, what the lines themselves say about why."""
    for figure in dict.fromkeys(line["id"] for line in rows):
        mine = [line for line in rows if line["id"] == figure and not line["refused"]]
        if mine:
            held = sum(line["holds"] for line in mine)
            yield f"{figure}: {held} of {len(mine)} rows hold their floors." + "".join(f" {x}" for x in short(mine))
        refused = {line["refused"] for line in rows if line["id"] == figure and line["refused"]}
        for reason in sorted(refused):
            yield f"{figure}: not measured, {reason}."
    for one in bench.exponents(rows):
        verdict = "as it should" if one.holds else f"expected 1 ± {one.within:g}"
        yield f"{one.id} {one.work}: time grows with the power {one.exponent:.2f} of the length, {verdict}."


def short(rows: Sequence[Line]) -> Iterator[str]:
    """Sentences about floors that are missed."""
    slow = [
        x for x in rows if x["floor_ratio"] is not None and x["ratio"] is not None and x["ratio"] < x["floor_ratio"]
    ]
    if slow:
        best = {id(line): at_limit(line) or 0.0 for line in slow}
        beyond = [line for line in slow if best[id(line)] < line["floor_ratio"]]
        theirs = between([percent(1 / value) for value in sorted(best.values(), reverse=True) if value])
        times = between([f"{value:.1f}" for value in sorted(best.values())])
        peers = ", ".join(sorted({line["peer"] for line in slow}))
        yield (
            f"Slower than the floor: {len(slow)}. There {peers} itself reaches {theirs} of the limit, so that a kernel "
            f"at all of the limit would be {times} times as fast."
        )
        if beyond:
            yield f"Beyond what this machine can do: the floor of {len(beyond)} of these."
    for line in rows:
        if line["floor_most"] is not None and line["ratio"] is not None and line["ratio"] > line["floor_most"]:
            yield f"{line['work']} takes {line['ratio']:.2f} times its part, at most {line['floor_most']:g} is allowed."
    low = [x for x in rows if x["floor_share"] is not None and x["share"] is not None and x["share"] < x["floor_share"]]
    if low:
        reached, floors = sorted(x["share"] for x in low), sorted(x["floor_share"] for x in low)
        yield (
            f"Short of the limit: {len(low)}, with {between([percent(x) for x in reached])} where "
            f"{between([percent(x) for x in floors])} is the floor ({'; '.join(line['work'] for line in low)})."
        )
    for line in rows:
        if line["wrong"]:
            yield f"{line['work']} is wrong, so it has no speed."


def pictures(machine: Machine) -> Iterator[tuple[str, dict[str, Any]]]:
    """A chart of each piece of work that was timed at two lengths or more: names and Vega-Lite specifications."""
    groups: dict[tuple[str, str, str], list[Line]] = {}
    for line in machine.rows.values():
        if line["ours_ms"] and line["share"]:
            words, _ = bench.split(line["work"])
            groups.setdefault((line["suite"], line["id"], words), []).append(line)
    for (suite, figure, words), lines in groups.items():
        if len(lines) > 1:
            name = (
                f"{suite}-{figure}-{words}".lower()
                .replace(" ", "-")
                .replace("/", "-")
                .replace("(", "")
                .replace(")", "")
            )
            yield name, chart(figure, words, sorted(lines, key=lambda line: bench.split(line["work"])[1]))


def chart(figure: str, words: str, lines: Sequence[Line]) -> dict[str, Any]:
    """Milliseconds against length on log axes: ours, the peer's, and what the machine's limit would take."""
    points = []
    for line in lines:
        n = bench.split(line["work"])[1]
        known = {"attnkit": line["ours_ms"], line["peer"]: line["peer_ms"], "limit": line["ours_ms"] * line["share"]}
        points += [{"n": n, "who": who, "ms": ms} for who, ms in known.items() if who and ms]
    peers = [who for who in dict.fromkeys(point["who"] for point in points) if who not in ("attnkit", "limit")]
    domain = ["attnkit", *peers, "limit"]
    colours = [charts.COLOURS[0][0], *(light for light, _ in charts.COLOURS[1 : 1 + len(peers)]), SOFT]
    lengths = sorted({point["n"] for point in points})
    axis = {
        "grid": True,
        "gridColor": GRID,
        "domain": False,
        "labelColor": SOFT,
        "titleColor": SOFT,
        "titleFontWeight": 400,
    }
    scale = {"domain": domain, "range": colours}
    x = {"field": "n", "type": "quantitative", "title": "tokens"}
    x |= {"scale": {"type": "log", "nice": False, "domain": [lengths[0] / 1.1, lengths[-1] * 1.1]}}
    x |= {"axis": axis | {"values": lengths, "format": ",d", "labelOverlap": True}}
    y = {"field": "ms", "type": "quantitative", "title": "ms", "scale": {"type": "log"}}
    y |= {"axis": axis | {"format": "~g", "tickCount": 4}}
    legend = {"orient": "bottom", "title": None, "labelColor": INK, "symbolType": "stroke", "symbolStrokeWidth": 2}
    who = {"field": "who", "type": "nominal", "scale": scale, "legend": legend}
    dash = {"condition": {"test": "datum.who == 'limit'", "value": [4, 3]}, "value": [1, 0]}
    told = ", ".join(f"{line['ours_ms']:g} ms at {bench.split(line['work'])[1]:,}" for line in lines)
    return {
        "$schema": f"https://vega.github.io/schema/vega-lite/v{charts.VEGA_LITE.partition('.')[0]}.json",
        "description": f"{figure} {words}, time against length: attnkit {told}".replace("[", "(").replace("]", ")"),
        "title": {"text": f"{figure}  {words}", "anchor": "start", "color": INK, "fontSize": 12, "offset": 10},
        "data": {"values": points},
        "width": 250,
        "height": 190,
        "padding": 12,
        "background": "#ffffff",  # readable on light and dark pages alike
        "layer": [
            {
                "mark": {"type": "line", "strokeWidth": 2},
                "encoding": {"x": x, "y": y, "color": who, "strokeDash": dash},
            },
            {
                "transform": [{"filter": "datum.who != 'limit'"}],
                "mark": {"type": "point", "filled": True, "size": 40, "opacity": 1},
                "encoding": {"x": x, "y": y, "color": who},
            },
        ],
        "config": {"font": "Helvetica, Arial, DejaVu Sans, sans-serif", "view": {"stroke": None}},
    }


def between(values: Sequence[str]) -> str:
    """``"40 to 68 %"`` from sorted figures, one figure when all are the same."""
    first, last = values[0], values[-1]
    if first == last:
        return first
    return f"{first.removesuffix(' %')} to {last}" if last.endswith(" %") else f"{first} to {last}"


def milliseconds(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f} ms" if value >= 100 else f"{value:.3g} ms"


def percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.0f} %"
