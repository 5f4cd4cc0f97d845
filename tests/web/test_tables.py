"""The terminal's view of a run, at the widths that terminals have."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
from rich.console import Console, RenderableType

from attnkit.report import kernel_table, pictures, table
from attnkit.report import units as u
from attnkit.report.measures import backends, bits_per_byte, hardest
from attnkit.report.results import Place, read

Line = dict[str, Any]
MakeRun = Callable[..., list[Line]]


def shown(renderable: RenderableType, width: int) -> list[str]:
    """The lines that a terminal of ``width`` shows."""
    screen = io.StringIO()
    Console(file=screen, width=width, force_terminal=False).print(renderable)
    return [line.strip() for line in screen.getvalue().splitlines()]


@pytest.mark.parametrize("width", [80, 100, 200])
def test_tables_fit_the_terminal_and_cut_nothing(full_run: list[Line], width: int) -> None:
    for renderable in (table(full_run), kernel_table(full_run), pictures(full_run)):
        lines = shown(renderable, width)
        assert max(map(len, lines)) <= width
    assert "…" not in "".join(shown(table(full_run), width))


def test_a_wide_terminal_gets_one_table_and_a_narrow_one_two_parts(full_run: list[Line]) -> None:
    assert sum(line.startswith("MHA") for line in shown(table(full_run), 200)) == 1
    assert sum(line.startswith("MHA") for line in shown(table(full_run), 80)) == 2
    assert "Backends: cpu, train sdpa." in "\n".join(shown(table(full_run), 80))


def test_backends_are_named_once_each(make_run: MakeRun) -> None:
    ran = {"prefill_backend": "chunk+cpu", "decode_backend": "cpu"}
    lines = [x | ran if x["kind"] == "speed" else x | {"backend": "chunk+sdpa"} for x in make_run(rows=("mha",))]
    assert [backends(row) for row in read(lines).rows] == ["chunk+cpu, train sdpa"]


def test_best_is_marked_only_alone_and_beyond_the_noise(make_run: MakeRun) -> None:
    rows = ("mha", "gqa", "window")
    lines = make_run(rows=rows)

    def marks(*bits: float) -> list[str]:
        planted = dict(zip(rows, bits, strict=True))
        measure = bits_per_byte(
            read([x | {"bits_per_byte": planted[x["row"]]} if x["kind"] == "text" else x for x in lines])
        )
        return [measure.mark(row) for row in rows]

    assert marks(2.2, 2.3, 2.4) == ["best", "", ""]
    assert marks(2.3, 2.31, 2.4) == ["tied", "tied", ""]
    assert marks(2.3, 2.31, 2.32) == ["", "", ""]


def test_the_accuracy_shown_is_the_hardest_that_somebody_learned(make_run: MakeRun) -> None:
    lines = make_run(rows=("mha", "window"))
    measure = hardest(read(lines), "recall")
    assert measure is not None
    assert measure.heading == ("recall %", "256·32")
    for line in lines:
        for point in line.get("points", ()):
            if (point["length"], point["pairs"]) > (128, 16):
                point["accuracy"] = 0.9
    measure = hardest(read(lines), "recall")
    assert measure is not None
    assert measure.heading == ("recall %", "128·16")


def test_what_is_missing_is_a_dash_and_an_empty_run_says_so(make_run: MakeRun) -> None:
    lines = [line for line in make_run(rows=("mha", "window")) if not (line["kind"] == "text" and line["row"] == "mha")]
    row = next(line for line in shown(table(lines), 200) if line.startswith("MHA"))
    assert "–" in row
    assert shown(table(lines[:1]), 80) == ["nothing was measured yet"]
    assert shown(pictures(lines[:1]), 80) == ["no masks were drawn"]


def test_the_last_line_about_a_row_counts(make_run: MakeRun) -> None:
    lines = make_run(rows=("mha",))
    again = next(line for line in lines if line["kind"] == "text") | {"bits_per_byte": 1.5}
    assert bits_per_byte(read([*lines, again])).samples["mha"].values == (1.5,)


def test_labels_are_short_and_never_the_same(make_run: MakeRun) -> None:
    results = read(make_run(rows=("mha", "strided", "window_sinks")))
    assert [row.label for row in results.rows] == ["MHA", "Strided", "Window + 4 first tokens"]
    masks = [
        {"kind": "mask", "row": name, "title": title, "n": 4, "picture": "■ ·\n■ ■"}
        for name, title in (("a", "Fixed (one)"), ("b", "Fixed (two)"), ("c", "Plain"), ("d", "Plain"))
    ]
    assert [row.label for row in read(masks).rows] == ["Fixed (one)", "Fixed (two)", "c", "d"]


def test_pictures_are_read_back_from_what_a_mask_draws(quick_run: list[Line]) -> None:
    rows = {row.id: row for row in read(quick_run).rows}
    assert len(rows["mha"].pictures[0].cells) == 24
    assert [name for name, row in rows.items() if not row.looks_past] == ["mha", "mqa", "gqa"]


def test_places_are_ordered_from_easy_to_hard() -> None:
    assert sorted([Place(128, 4), Place(64, 16), Place(64, 4)]) == [Place(64, 4), Place(64, 16), Place(128, 4)]


def test_numbers_read_well() -> None:
    assert [u.size(x) for x in (0, 1000, 1024, 1536, 2**20 - 1, 16 * 2**20)] == [
        "0 B",
        "1000 B",
        "1 KiB",
        "1.5 KiB",
        "1 MiB",
        "16 MiB",
    ]
    assert [u.count(x) for x in (12, 999, 999.9, 18_734, 1_200_000)] == ["12", "999", "1k", "18.7k", "1.2M"]
    assert [u.percent(x) for x in (0, 0.0004, 0.025, 0.5, 0.996, 0.9999, 1)] == [
        "0 %",
        "0.1 %",
        "2.5 %",
        "50 %",
        "99.6 %",
        "99.9 %",
        "100 %",
    ]
    assert [u.rounded(x) for x in (1234567, 0.00012345, 3.0)] == ["1230000", "0.000123", "3"]


def test_a_row_without_a_mask_has_its_title_from_its_speed(make_run: MakeRun) -> None:
    lines = [x for x in make_run(rows=("mha", "window")) if x["kind"] != "mask"]
    name = {"name": "Kimi Delta Attention"}
    named = [x | name if x["kind"] == "speed" and x["row"] == "window" else x for x in lines]
    assert [row.label for row in read(named).rows] == ["mha", "Kimi Delta Attention"]
