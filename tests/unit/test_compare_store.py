"""Results survive kills, torn lines and full disks, and runs that do not belong together are refused."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from attnkit.compare.store import FORMAT, RESULTS, Store, replace

HEADER: dict[str, Any] = {
    "kind": "run",
    "format": FORMAT,
    "attnkit": "0.1.0",
    "commit": "abc",
    "torch": "2.13.0",
    "machine": {"cpu": "one", "cores": 2},
    "settings": {"quick": True, "seeds": [0], "rows": ["mha", "gqa"]},
    "started": "2026-11-22T12:00:00+00:00",
}


def line(row: str, seed: int = 0) -> dict[str, Any]:
    return {"kind": "text", "row": row, "seed": seed, "bits_per_byte": 2.5}


def begin(folder: Path, *lines: dict[str, Any], resume: bool = False, **changed: Any) -> Store:
    store = Store(folder, HEADER | changed, resume=resume)
    store.add(lines)
    store.close()
    return store


def on_disk(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in (folder / RESULTS).read_text().splitlines()]


def test_each_line_is_on_disk_when_add_returns(tmp_path: Path) -> None:
    store = Store(tmp_path / "deep" / "out", HEADER, resume=False)
    store.add([line("mha")])
    assert on_disk(tmp_path / "deep" / "out") == [HEADER, line("mha")]
    store.close()


def test_resume_keeps_what_is_finished_and_its_own_header(tmp_path: Path) -> None:
    begin(tmp_path, line("mha"))
    store = Store(tmp_path, HEADER | {"started": "later"}, resume=True)
    assert line("mha") in store
    assert line("mha", seed=1) not in store
    assert store.header == HEADER
    assert "begun 2026-11-22T12:00:00+00:00" in store.notices[0]
    store.close()
    assert on_disk(tmp_path) == [HEADER, line("mha")]


def test_a_torn_last_line_is_dropped_with_a_notice(tmp_path: Path) -> None:
    begin(tmp_path, line("mha"))
    with (tmp_path / RESULTS).open("a") as file:
        file.write('{"kind": "text", "row": "gq')
    store = begin(tmp_path, line("gqa"), resume=True)
    assert any("cut off" in notice for notice in store.notices)
    assert on_disk(tmp_path) == [HEADER, line("mha"), line("gqa")]


def test_resume_of_nothing_starts(tmp_path: Path) -> None:
    store = begin(tmp_path, resume=True)
    assert "nothing to go on with" in store.notices[0]
    assert on_disk(tmp_path) == [HEADER]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"format": FORMAT + 1}, f"was begun with format {FORMAT}, this run has {FORMAT + 1}"),
        ({"attnkit": "0.2.0"}, 'attnkit "0.1.0", this run has "0.2.0"'),
        ({"commit": "def"}, 'commit "abc", this run has "def"'),
        ({"settings": {**HEADER["settings"], "seeds": [0, 1]}}, r"settings seeds \[0\], this run has \[0, 1\]"),
        ({"machine": {"cpu": "other", "cores": 2}}, 'machine cpu "one", this run has "other"'),
    ],
)
def test_resume_refuses_another_run_naming_both(tmp_path: Path, changed: dict[str, Any], said: str) -> None:
    begin(tmp_path, line("mha"))
    with pytest.raises(ValueError, match=said):
        Store(tmp_path, HEADER | changed, resume=True)
    assert on_disk(tmp_path) == [HEADER, line("mha")]


@pytest.mark.parametrize("damage", ["no json\n", '["a list"]\n', '{"kind": "run"}\n'])
def test_resume_refuses_a_damaged_file_naming_the_line(tmp_path: Path, damage: str) -> None:
    begin(tmp_path, line("mha"))
    with (tmp_path / RESULTS).open("a") as file:
        file.write(damage)
    with pytest.raises(ValueError, match="line 3 of .*results.jsonl is no"):
        Store(tmp_path, HEADER, resume=True)


def test_resume_refuses_a_file_of_something_else(tmp_path: Path) -> None:
    (tmp_path / RESULTS).write_text('{"kind": "kernel"}\n')
    with pytest.raises(ValueError, match="line 1 of .* is no line of attnkit compare"):
        Store(tmp_path, HEADER, resume=True)


def test_a_new_run_moves_the_old_one_where_it_can_be_resumed(tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text("the old report")
    for _ in range(3):
        store = begin(tmp_path, line("mha"))
    assert on_disk(tmp_path) == [HEADER, line("mha")]
    aside = tmp_path / "2026-11-22T12-00-00+00-00"
    assert str(aside) in store.notices[0]
    assert (aside / "report.html").read_text() == "the old report"
    assert not (tmp_path / "report.html").exists()
    for folder in (aside, aside.with_name(f"{aside.name}-2")):
        assert line("mha") in begin(folder, resume=True).lines


def test_a_second_process_is_refused(tmp_path: Path) -> None:
    store = Store(tmp_path, HEADER, resume=False)
    code = (
        "import json, sys; from pathlib import Path; from attnkit.compare.store import Store\n"
        f"try: Store(Path({str(tmp_path)!r}), json.loads({json.dumps(HEADER)!r}), resume=False)\n"
        "except ValueError as error: print(error)"
    )
    second = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "another attnkit compare is writing to" in second.stdout
    store.close()
    assert on_disk(tmp_path) == [HEADER]


def test_a_file_where_the_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    for folder in (tmp_path / "out", tmp_path / "out" / "deeper"):
        with pytest.raises(OSError, match="cannot write .*results.jsonl .*: choose a folder"):
            Store(folder, HEADER, resume=False)
    assert (tmp_path / "out").read_text() == "mine"


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*args: object) -> int:
        raise PermissionError(errno.EACCES, "Permission denied", str(tmp_path))

    monkeypatch.setattr(os, "open", refused)  # permissions do not stop the root user that tests may run as
    with pytest.raises(OSError, match=r"results.jsonl \(Permission denied\): choose a folder"):
        Store(tmp_path, HEADER, resume=False)


def test_a_full_disk_says_so(tmp_path: Path) -> None:
    (tmp_path / RESULTS).symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"No space left on device\): free some space, then go on with --resume"):
        Store(tmp_path, HEADER, resume=False)


def test_a_write_that_stops_half_way_leaves_no_half_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path, HEADER, resume=False)
    real, calls = os.write, []

    def filling(file: int, data: bytes) -> int:
        calls.append(file)
        if len(calls) > 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(file, data[:10])

    monkeypatch.setattr(os, "write", filling)
    with pytest.raises(OSError, match="No space left"):
        store.add([line("mha")])
    monkeypatch.undo()
    store.add([line("gqa")])
    store.close()
    assert on_disk(tmp_path) == [HEADER, line("gqa")]


def test_replace_puts_all_of_a_file_or_nothing(tmp_path: Path) -> None:
    report = tmp_path / "report.html"
    replace(report, lambda part: part.write_text("good") and None)

    def half(part: Path) -> None:
        part.write_text("ha")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="cannot write .*report.html .No space left"):
        replace(report, half)
    assert report.read_text() == "good"
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
