"""The HTML report: complete in one file, harmless whatever its input, and drawn without an error in a real browser."""

from __future__ import annotations

import builtins
import re
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from attnkit.report import picture, write_html
from attnkit.report.charts import COLOURS, figures, kernels, spread, style
from attnkit.report.html import command, page
from attnkit.report.results import read

pytest.importorskip("altair", reason="the report needs altair: pip install 'attnkit[compare]'")
pytest.importorskip("vl_convert", reason="the report needs vl-convert: pip install 'attnkit[compare]'")

Line = dict[str, Any]
MakeRun = Callable[..., list[Line]]
HOSTILE = "</script><script>window.injected = 1</script><img src=x onerror='window.injected = 1'>\"'&{{ 7 * 7 }}"


class Tags(HTMLParser):
    """The tags of a page with their attributes, and whether each that must be closed is."""

    VOID = ("meta", "link", "br", "img")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes another tag"


def hostile(lines: list[Line]) -> list[Line]:
    lines = [line | {"title": f"{line['title']} {HOSTILE}"} if line["kind"] == "mask" else line for line in lines]
    lines[0] = lines[0] | {
        "settings": lines[0]["settings"] | {"text": HOSTILE, "tokenizer": HOSTILE},
        "commit": HOSTILE,
    }
    return [line | {"work": HOSTILE} if line.get("id") == "K2" else line for line in lines]


def complaints(browser: Any) -> list[Any]:
    return list(browser.seen("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded"))


def requests(browser: Any) -> list[str]:
    urls = [event["request"]["url"] for event in browser.seen("Network.requestWillBeSent")]
    return [url for url in urls if not url.startswith("data:")]


@pytest.fixture(scope="module")
def full_report(full_run: list[Line], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("full") / "report.html"
    write_html(full_run, path)
    return path


@pytest.fixture(scope="module")
def quick_report(quick_run: list[Line], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("quick") / "report.html"
    write_html(quick_run, path)
    return path


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1400])
def test_every_chart_is_drawn_without_network_or_console_errors(
    browser: Any, full_run: list[Line], full_report: Path, width: int, scheme: str
) -> None:
    path = full_report
    browser.open(path, width=width, scheme=scheme)
    assert complaints(browser) == []
    assert requests(browser) == [path.as_uri()]
    results = read(full_run)
    assert browser.evaluate("Number(document.documentElement.dataset.drawn)") == len(figures(results)) + 1
    sizes = browser.evaluate(
        "[...document.querySelectorAll('[data-figure] svg')].map((s) => [s.clientWidth, s.clientHeight])"
    )
    assert len(sizes) == len(figures(results)) + 1
    assert all(200 < wide <= width and high > 150 for wide, high in sizes), sizes
    # Nothing but the tables, in their own frames, is wider than the window.
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    marks = browser.evaluate("document.querySelectorAll('#recall-256 .mark-symbol path').length")
    assert marks == 8 * 4 + 8  # eight rows at four numbers of pairs, and the key of each row's name
    names = browser.evaluate(
        "[...document.querySelectorAll('#decode .mark-text text')].filter((t) => t.textContent === 'MHA').length"
    )
    assert names == (1 if width > 500 else 0)


def test_marks_of_fixed_states_are_hollow(full_run: list[Line]) -> None:
    (figure,) = (figure for figure in figures(read(full_run)) if figure.id == "recall-state")
    marks = [x for x in figure.spec["layer"] if x["mark"]["type"] == "point"]
    rows = [{value["row"] for value in mark["data"]["values"]} for mark in marks]
    assert [mark["mark"]["filled"] for mark in marks] == [True, False]
    assert rows[1] == {"Sliding window", "Window + 4 first tokens"}
    assert len(rows[0] | rows[1]) == 8
    assert "Of fixed size: Sliding window and Window + 4 first tokens." in figure.description


def test_pointing_at_a_row_shows_it_in_every_chart(browser: Any, quick_report: Path) -> None:
    browser.open(quick_report)
    lines = "[...document.querySelectorAll('#decode .mark-line path')]"
    faded = f"{lines}.filter((p) => p.getAttribute('opacity') < 0.5).length"
    assert browser.evaluate(faded) == 0
    browser.evaluate("document.querySelector('.keys button[data-row=MHA]').click()")
    browser.wait(f"{faded} === 7")
    assert browser.evaluate("document.querySelectorAll('.keys [aria-pressed=true]').length") == 1
    browser.evaluate("document.querySelector('.keys button[data-row=MHA]').click()")
    browser.wait(f"{faded} === 0")


def test_charts_follow_the_width_and_the_colour_scheme(browser: Any, quick_report: Path) -> None:
    browser.open(quick_report, width=1400)
    line = "document.querySelector('#decode .mark-line path')?.getAttribute('stroke')"
    assert browser.evaluate(line) == COLOURS[0][0]
    browser.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark"}])
    browser.wait(f"{line} === '{COLOURS[0][1]}'")
    browser.send("Emulation.setDeviceMetricsOverride", width=400, height=900, deviceScaleFactor=1, mobile=False)
    browser.wait("document.querySelector('#decode svg')?.clientWidth <= 400")
    assert complaints(browser) == []


def test_nothing_in_the_data_becomes_code(browser: Any, full_run: list[Line], tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    write_html(hostile(full_run), path)
    browser.open(path)
    assert complaints(browser) == []
    assert browser.evaluate("window.injected") is None
    assert browser.evaluate("document.querySelector('h1').textContent").endswith(HOSTILE)
    browser.evaluate("document.querySelectorAll('.keys button')[0].click()")
    assert browser.evaluate("document.querySelectorAll('img').length") == 0


def test_hostile_text_stays_text_in_the_source(full_run: list[Line], full_report: Path) -> None:
    ordinary, attacked = Tags(full_report.read_text("utf-8")), Tags(page(hostile(full_run)))
    assert [tag for tag, _ in attacked.found] == [tag for tag, _ in ordinary.found]
    assert attacked.open == ordinary.open == []


def test_the_file_needs_nothing_else_and_is_not_large(full_report: Path) -> None:
    assert full_report.stat().st_size < 1_500_000
    tags = Tags(full_report.read_text("utf-8"))
    links = [a.get(name) or "" for _, a in tags.found for name in ("src", "href", "srcset", "action")]
    assert all(link in ("", "data:,") for link in links)
    policy = next(a["content"] for tag, a in tags.found if tag == "meta" and "http-equiv" in a)
    assert policy is not None
    assert policy.startswith("default-src 'none'")


def test_what_is_drawn_is_said_in_words_too(full_run: list[Line], full_report: Path) -> None:
    tags = Tags(full_report.read_text("utf-8"))
    drawn = [a for tag, a in tags.found if a.get("role") == "img"]
    assert len(drawn) == len(figures(read(full_run))) + 1 + 8
    assert all(len(a.get("aria-label") or "") > 30 for a in drawn)
    assert all(a.get("scope") in ("row", "col") for tag, a in tags.found if tag == "th")
    ids = {a["id"] for _, a in tags.found if "id" in a}
    assert {a[name] for _, a in tags.found for name in ("aria-labelledby", "aria-describedby") if name in a} <= ids


@pytest.mark.parametrize("kept", [0, 1, 2, 7, 16, 20, 40])
def test_a_run_can_be_shown_at_any_time(browser: Any, quick_run: list[Line], tmp_path: Path, kept: int) -> None:
    path = tmp_path / "report.html"
    write_html(quick_run[:kept], path)
    assert Tags(path.read_text("utf-8")).open == []
    browser.open(path)
    assert complaints(browser) == []


def test_many_rows_and_odd_numbers_are_drawn(browser: Any, make_run: MakeRun, tmp_path: Path) -> None:
    lines = make_run(rows=("mha", "window"))
    copies = [x | {"row": f"{x['row']}{i}"} for x in lines if "row" in x for i in range(12)]
    run = lines[0] | {"settings": lines[0]["settings"] | {"rows": [], "bytes": None}}
    odd = [
        x | {"cache_allocated": 0, "decode": [{"context": 1, "ms": 0.5}]} if x["kind"] == "speed" else x for x in copies
    ]
    path = tmp_path / "report.html"
    for case in (
        [run, *copies],
        [run, *odd],
        [run, *[x | {"points": x["points"][:1]} if "points" in x else x for x in odd]],
    ):
        write_html(case, path)
        browser.open(path)
        assert complaints(browser) == []
    looks = style(read(copies).rows)
    assert len(set(looks)) == len(looks) == 24


def test_a_report_is_replaced_whole_or_not_at_all(quick_run: list[Line], tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    write_html(quick_run, path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="cannot be read"):
        write_html([*quick_run, {"kind": "surprise"}], path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_place_that_cannot_be_written_is_one_sentence(quick_run: list[Line], tmp_path: Path) -> None:
    with pytest.raises(OSError, match="cannot write .*No such file or directory") as refused:
        write_html(quick_run, tmp_path / "nowhere" / "report.html")
    assert "\n" not in str(refused.value)


def test_without_altair_the_sentence_says_what_to_install(
    quick_run: list[Line], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any, **named: Any) -> Any:
        if name.partition(".")[0] == "altair":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *rest, **named)

    for name in [name for name in sys.modules if name.partition(".")[0] == "altair"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=re.escape("pip install 'attnkit[compare]'")):
        write_html(quick_run, tmp_path / "report.html")
    assert list(tmp_path.iterdir()) == []


def test_the_picture_is_an_svg_or_a_png_of_two_charts(full_run: list[Line], tmp_path: Path) -> None:
    picture(full_run, tmp_path / "compare.svg")
    drawn = (tmp_path / "compare.svg").read_text("utf-8")
    assert drawn.startswith("<svg")
    assert all(
        word in drawn
        for word in ("Quality against cache", "Decode time against context", "Sliding window", COLOURS[1][0])
    )
    picture(full_run, tmp_path / "compare.png")
    assert (tmp_path / "compare.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="a name that ends in .svg or .png"):
        picture(full_run, tmp_path / "compare.gif")
    with pytest.raises(ValueError, match="nothing to draw yet"):
        picture(full_run[:3], tmp_path / "compare.svg")


def test_the_page_says_how_to_run_it_again(make_run: MakeRun) -> None:
    quick_run = make_run()
    rows = "mha,mqa,gqa,window,window_sinks,dilated,strided,global_local"
    same = f"attnkit compare --quick --mechanisms {rows} --seeds 0 --tokenizer bytes"
    assert command(read(quick_run)) == same
    quick_run[0] = quick_run[0] | {
        "settings": quick_run[0]["settings"] | {"quick": False, "text": "my novel.txt, b.txt"}
    }
    assert command(read(quick_run)).startswith("attnkit compare --text 'my novel.txt' --text b.txt --mechanisms")
    text = page(quick_run)
    assert all(fact in text for fact in ("AMD EPYC 9B45", "2.13.0+cpu", "0b909db", "v4bf16", "2026-11-22T12:00:00"))


def test_a_chart_without_a_share_of_the_limit_is_left_out(quick_run: list[Line]) -> None:
    unknown = [line | {"share": None} if line["kind"] == "kernel" else line for line in quick_run]
    assert kernels(read(unknown)) is None
    assert "Kernels and limits" in page(unknown)


@pytest.mark.parametrize(
    "wanted", [[], [5.0], [10.0, 10.0, 10.0], [299.0, 298.0, 300.0, 1.0], [50.0, 64.0, 78.0, 40.0]]
)
def test_names_are_moved_apart_and_stay_inside(wanted: list[float]) -> None:
    placed = spread(wanted, 15.0, 0.0, 300.0)
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    assert all(placed[b] - placed[a] >= 15.0 - 1e-9 for a, b in zip(order, order[1:], strict=False))
    assert all(0 <= place <= 300 for place in placed)
    if len(wanted) == 1:
        assert placed == wanted
