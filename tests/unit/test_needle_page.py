"""The page "Retrieval" shows what the lines say, and a file of lines goes on where it was."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

vl_convert = pytest.importorskip("vl_convert", reason="the page's chart needs the extra [docs]")
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(sys, "path", [str(ROOT / "docs"), str(ROOT), *sys.path])
    import needle_page

    return needle_page


def run(**settings: Any) -> dict[str, Any]:
    made = {"kind": "run", "format": 1, "settings": {"model": "a toy", **settings}, "machine": {"cpu": "a processor"}}
    return made | {"torch": "2", "transformers": "5", "attnkit": "0", "commit": "c", "started": "2026-01-01T00:00"}


def needle(form: str, tokens: int, depth: float, digits: int) -> dict[str, Any]:
    made = {"kind": "needle", "form": form, "tokens": tokens, "text": 0, "depth": depth, "digits": digits}
    return made | {"found": digits == 5, "logprob": -1.0, "bytes": tokens << 10}


LINES = [
    run(),
    *(needle("full", n, depth, 5) for n in (1000, 2000) for depth in (0.1, 0.9)),
    *(needle("H2O", 2000, depth, digits) for depth, digits in ((0.1, 2), (0.9, 5))),
]


def test_the_table_counts_needles_and_digits(page: Any) -> None:
    assert list(page.rows(LINES)) == [
        ("full", "2 of 2 (10 of 10 digits)", "2 of 2 (10 of 10 digits)", "2.0"),
        ("H2O", "", "1 of 2 (7 of 10 digits)", "2.0"),
    ]


def test_the_chart_is_drawn_and_described(page: Any) -> None:
    spec = page.chart(LINES)
    assert {(v["form"], v["tokens"], v["depth"], v["digits"]) for v in spec["data"]["values"]} >= {
        ("full", "1,000", "10%", 5.0),
        ("H2O", "2,000", "90%", 5.0),
        ("H2O", "2,000", "10%", 2.0),
    }
    assert "H2O 1 of 2 (7 of 10 digits)" in spec["description"]
    svg = vl_convert.vegalite_to_svg(spec, vl_version=page.charts.VEGA_LITE)
    assert "H2O" in svg and "2,000" in svg


def test_a_file_of_lines_goes_on_where_it_was(page: Any, tmp_path: Path) -> None:
    from benchmarks.lines import Lines

    path = tmp_path / "x-needle.jsonl"
    first = Lines(path, run())
    first.add(LINES[1])
    again = Lines(path, run())
    assert again.found(form="full", tokens=1000) == [LINES[1]] and not again.found(form="H2O")
    with pytest.raises(ValueError, match="was measured with .* name another with --out"):
        Lines(path, run(depths=[0.5]))
    page.write(tmp_path, tmp_path / "needle")
    assert "1 of 1 (5 of 5 digits)" in (tmp_path / "needle" / "results.md").read_text(encoding="utf-8")
