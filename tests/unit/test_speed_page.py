"""The page "Speed": newest rows of each machine, and what it says of floors that are missed."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vl_convert", reason="the page's charts need the extra [docs]")
DOCS = Path(__file__).resolve().parents[2] / "docs"


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(sys, "path", [str(DOCS), *sys.path])
    import speed_page

    return speed_page


def line(work: str, **changes: Any) -> dict[str, Any]:
    made = {"kind": "kernel", "id": "K1", "suite": "softmax", "work": work, "model": "a toy", "threads": 2}
    made |= {"ours_ms": 2.0, "peer": "SDPA", "peer_ms": 4.0, "ratio": 2.0, "share": 0.8, "floor_ratio": 2.2}
    made |= {"floor_most": None, "floor_share": None, "floor_exponent": None, "holds": False}
    return made | {"wrong": None, "refused": None} | changes


def file(started: str, *rows: dict[str, Any]) -> list[dict[str, Any]]:
    machine = {"cpu": "a processor", "level": "v3", "cores": 2, "system": "Linux"}
    run = {"kind": "run", "started": started, "machine": machine}
    return [run, {"kind": "limits", "fma_gflops": {"1": 1.0}, "dot_gflops": None, "read_gbs": {"1": 1.0}}, *rows]


def test_the_newest_row_of_each_piece_of_work_is_shown(page: Any) -> None:
    old = file("2026-01-01", line("a n1", ours_ms=9.0), line("b n1", ours_ms=9.0))
    (machine,) = page.machines([file("2026-01-02", line("a n1", ours_ms=1.0)), old])
    assert {work: row["ours_ms"] for (_, work), row in machine.rows.items()} == {"a n1": 1.0, "b n1": 9.0}
    assert machine.run["started"] == "2026-01-02"
    assert page.machines([[{"kind": "run", "started": "2026"}, {"kind": "memory"}]]) == []


def test_a_floor_beyond_the_limit_is_told_from_one_that_is_missed(page: Any) -> None:
    assert page.at_limit(line("a n1")) == pytest.approx(2.5)
    (near,) = page.conclusions([line("a n1")])
    assert "Slower than the floor: 1" in near and "itself reaches 40 %" in near and "Beyond" not in near
    (beyond,) = page.conclusions([line("a n1", share=0.95)])
    assert "2.1 times as fast" in beyond and "Beyond what this machine can do: the floor of 1" in beyond
    (held,) = page.conclusions([line("a n1", ratio=2.3, holds=True)])
    assert held == "K1: 1 of 1 rows hold their floors."
    most = line("a n1", floor_ratio=None, floor_most=1.3, ratio=1.5)
    assert page.at_limit(most) is None and "1.50 times its part, at most 1.3" in next(page.conclusions([most]))
    refused = line("a n1", refused="no kernel", ours_ms=None, share=None, ratio=None)
    assert list(page.conclusions([refused])) == ["K1: not measured, no kernel."]


def test_the_limit_is_a_line_of_the_chart(page: Any) -> None:
    rows = [line(f"a n{n}", ours_ms=n / 100, peer_ms=n / 50) for n in (1024, 2048)]
    ((name, spec),) = page.pictures(page.machines([file("2026", *rows)])[0])
    points = {(point["who"], point["n"]): point["ms"] for point in spec["data"]["values"]}
    assert name == "softmax-k1-a" and points["limit", 2048] == pytest.approx(0.8 * points["attnkit", 2048])
    assert (
        spec["layer"][0]["encoding"]["x"]["scale"]["type"]
        == spec["layer"][0]["encoding"]["y"]["scale"]["type"]
        == "log"
    )
