"""``attnkit bench`` from the outside: its table, its lines, its file, its exit codes."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

import attnkit
from attnkit import bench, native
from attnkit.bench import memory, probes, timing
from attnkit.cli.bench import _default_path
from attnkit.cli.output import console
from attnkit.mechanisms.softmax import cpu
from attnkit.spec import Sizes

needs_native = pytest.mark.skipif(not native.STATUS.available, reason=f"nothing to measure: {native.STATUS.reason}")
KINDS = ["run", "limits", "kernel", "kernel"]


def case(floor: float = 0.0, **changes: Any) -> bench.Case:
    made = {
        "id": "K1",
        "suite": "softmax",
        "mechanism": "softmax",
        "model": "a toy",
        "sizes": Sizes(h=4, g=2, m=96, n=96, d=16, e=16),
        "dtype": "float32",
        "mask": "causal()",
        "limit": "fma",
        "floors": bench.Floors(ratio=floor),
        "quick": True,
    }
    return bench.Case(**(made | changes))


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two tiny cases in place of the real ones, and no minimum time."""
    decode = case(id="K5", sizes=Sizes(h=4, g=2, m=1, n=200, d=16, e=16), mask=None, limit="read", dtype="bfloat16")
    monkeypatch.setattr(bench, "cases", lambda ids=(), quick=False, suite=(): (case(), decode))
    monkeypatch.setattr(timing, "SECONDS", 0.0)
    monkeypatch.setattr(probes, "BUFFER_BYTES", 1 << 20)
    monkeypatch.setattr(probes, "PROBE_SECONDS", 0.001)


pytestmark = [pytest.mark.usefixtures("small"), needs_native]


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_table(run: Any, tmp_path: Path) -> None:
    done = run("bench", "--out", tmp_path / "r.jsonl")
    assert done.code == 0
    assert "prefill causal fp32 h4/2 d16 n96" in done.out and "decode bf16 h4/2 d16 n200" in done.out
    assert "2 of 2 rows hold their floors." in done.out
    assert "limit of float32 multiply-adds" in done.out and "GB/s on 1" in done.out
    assert f"written to {tmp_path / 'r.jsonl'}" in done.out


def test_lines_are_printed_and_kept(run: Any, tmp_path: Path) -> None:
    path = tmp_path / "deep" / "r.jsonl"
    done = run("bench", "--json", "--out", path)
    printed = [json.loads(line) for line in done.out.splitlines()]
    assert printed == read(path) == bench.read(path)
    assert [line["kind"] for line in printed] == KINDS
    head, limits, first, _ = printed
    assert head["attnkit"] == attnkit.__version__ and head["machine"]["level"] == native.get_level()
    assert set(limits["fma_gflops"]) >= {"1"}
    reached = first["ratio"] >= first["floor_ratio"] and first["share"] >= (first["floor_share"] or 0)
    assert first["holds"] == reached and min(first["ratio"], first["share"], first["limit"]) > 0
    assert first["rounds"] >= 7
    assert [entry.name for entry in path.parent.iterdir()] == ["r.jsonl"]


def test_show_prints_an_earlier_run(run: Any, tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    done = run("bench", "--out", path)
    shown = run("bench", "--show", path)
    assert shown.out == done.out.replace(f"written to {path}\n", "")
    assert run("bench", "--show", path, "--json").out == path.read_text(encoding="utf-8")


def test_a_part_of_the_figures_is_not_kept_unasked(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attnkit.cli.bench._default_path", lambda: tmp_path / "default.jsonl")
    assert run("bench", "--quick").code == run("bench", "--only", "K1,k5").code == 0
    assert list(tmp_path.iterdir()) == []
    assert run("bench").code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["default.jsonl"]


def test_where_a_whole_run_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "checkout", lambda: Path("top"))
    path = _default_path()
    assert path.parent == Path("top/benchmarks/results") and path.name.endswith(f"-{native.get_level()}.jsonl")
    monkeypatch.setattr(bench, "checkout", lambda: None)
    assert _default_path() == Path("attnkit-bench.jsonl")


def test_a_busy_machine_is_told(run: Any, tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    run("bench", "--threads", "2", "--out", path)
    lines = [line | ({"others": 1.26} if line["kind"] == "kernel" else {}) for line in read(path)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert "kept up to 1.3 cores busy" in run("bench", "--show", path).out
    quiet = [line | ({"others": 0.01} if line["kind"] == "kernel" else {}) for line in lines]
    path.write_text("".join(json.dumps(line) + "\n" for line in quiet))
    assert "cores busy" not in run("bench", "--show", path).out


def test_a_narrow_terminal_leaves_out_what_it_can(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "r.jsonl"
    wide = run("bench", "--out", path).out
    monkeypatch.setattr("attnkit.cli.bench.console", lambda **options: console(width=80))
    narrow = run("bench", "--show", path).out
    assert "a toy" in wide and "a toy" not in narrow
    assert "ratio" in wide and "ratio" in narrow
    assert max(map(len, narrow.splitlines())) <= 80


def test_a_missed_floor_fails_only_when_asked(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "cases", lambda ids=(), quick=False, suite=(): (case(floor=1e9),))
    done = run("bench", "--quick")
    assert done.code == 0 and "missed" in done.out
    assert run("bench", "--quick", "--check").code == 1


def test_a_wrong_kernel_gets_no_speed(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    right = cpu.forward

    def wrong(**call: Any) -> Any:
        return right(**call | {"scale": call["scale"] * 1.01})

    monkeypatch.setattr(cpu, "forward", wrong)
    done = run("bench", "--quick", "--check")
    assert done.code == 1
    assert "wrong" in done.out and "so it has no speed" in done.out
    rows = [json.loads(line) for line in run("bench", "--quick", "--json").out.splitlines()][2:]
    assert all(row["ratio"] is None and row["share"] is None and not row["holds"] for row in rows)


def test_threads_are_set_for_the_run_alone(run: Any) -> None:
    import torch

    before = torch.get_num_threads()
    lines = [json.loads(line) for line in run("bench", "--quick", "--threads", "1", "--json").out.splitlines()]
    assert lines[0]["settings"]["threads"] == lines[2]["threads"] == 1
    assert torch.get_num_threads() == before


def test_ctrl_c_keeps_finished_rows_and_the_old_file(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text("an earlier run")
    real, calls = timing.measure, iter(range(9))

    def stopped(*arguments: Any, **options: Any) -> Any:
        if next(calls) == 1:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    monkeypatch.setattr(timing, "measure", stopped)
    done = run("bench", "--out", path)
    assert done.code == 130 and done.out == ""
    part = bench.unfinished(path)
    assert done.err.splitlines()[-1] == f"attnkit: stopped, 1 finished rows are in {part}"
    assert path.read_text() == "an earlier run"
    assert [line["kind"] for line in read(part)] == KINDS[:3]


def test_a_full_disk_leaves_the_old_file(run: Any, tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text("an earlier run")
    bench.unfinished(path).symlink_to("/dev/full")
    assert "No space left on device" in run("bench", "--out", path).error
    assert path.read_text() == "an earlier run"
    assert list(tmp_path.iterdir()) == [path]


def test_a_place_that_cannot_be_written_is_told_before_measuring(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timing, "measure", lambda *_, **__: pytest.fail("measured for nothing"))
    (tmp_path / "file").write_text("")
    assert run("bench", "--out", tmp_path / "file" / "r.jsonl").error
    assert "is a folder" in run("bench", "--out", tmp_path).error


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder(run: Any, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    assert "Permission denied" in run("bench", "--out", tmp_path / "r.jsonl").error


def test_memory_has_a_table_and_a_file_of_its_own(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    peaks = {"forward": 12.34, "training": 4096.0}
    measured = lambda spec, work, n: memory.Peak(spec.name, work, "chunk", n, peaks[work])  # noqa: E731
    monkeypatch.setattr(memory, "measure", measured)
    path = tmp_path / "m.jsonl"
    done = run("bench", "--memory", "--only", "path", "--out", path)
    assert "12 MiB" in done.out and "4,096 MiB" in done.out and "missed" in done.out
    assert [(line["kind"], line.get("holds")) for line in read(path)] == [
        ("run", None), ("memory", True), ("memory", False),
    ]  # fmt: skip
    assert run("bench", "--show", path).out == done.out.replace(f"written to {path}\n", "")
    assert run("bench", "--memory", "--only", "path", "--check").code == 1
    assert "there is no mechanism 'K1'" in run("bench", "--memory", "--only", "K1").error


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ('{"kind": "run", "format": 2, "attnkit": "9.0"}\n', "format 2 (attnkit 9.0)"),
        ('{"kind": "run"}\n', "format None"),
        ('{"kind": "limits"}\n', "does not start with a run"),
        ('{"kind": "run", "format": 1}\n{"kind": "lim', "line 2 is no JSON"),
        ("[]\n", "line 1 has no kind"),
        ('{"kind": "run", "format": 1}\n', "no measured kernels"),
        ("", "does not start with a run"),
        ("\x00\x01", "is no JSON"),
    ],
    ids=["another version", "no version", "no head", "cut off", "no line", "no rows", "empty", "binary"],
)
def test_a_file_that_is_no_results_file(run: Any, tmp_path: Path, text: str, named: str) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text(text)
    assert named in run("bench", "--show", path).error


def test_without_kernels_there_is_nothing_to_measure(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "STATUS", native.Status(available=False, reason="it was struck by lightning"))
    monkeypatch.setattr(native, "_LIBRARY", None)
    assert "it was struck by lightning" in run("bench", "--quick").error


def test_a_refused_row_says_why_and_is_no_miss_of_a_floor(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = case(mechanism="gated", mask=None, peer=None)
    monkeypatch.setattr(bench, "cases", lambda ids=(), quick=False, suite=(): (case(), alone))
    done = run("bench", "--quick")
    if "refused" not in done.out:
        pytest.skip("this mechanism has a native kernel by now")
    assert done.code == 0 and "refused: gated has no backend 'cpu'" in done.out
    assert "of 1 rows hold their floors" in done.out


def test_a_level_is_forced_for_the_run_alone(run: Any) -> None:
    before, slowest = native.get_level(), native.STATUS.levels[0]
    first, *_ = (json.loads(line) for line in run("bench", "--quick", "--level", slowest, "--json").out.splitlines())
    assert first["machine"]["level"] == slowest and native.get_level() == before
    assert "expected one of" in run("bench", "--level", "v9").error
