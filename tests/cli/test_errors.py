"""A user's error is one sentence and exit code 2, whatever it was; a pipe that closes or Ctrl-C is no traceback."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from attnkit import cli
from attnkit.registry import mechanisms

KNOWN = f"name one of {', '.join(mechanisms())}"
ERRORS = {
    "no such command": (["nope"], "nope"),
    "no such option": (["list", "--bad"], "--bad"),
    "no argument": (["explain"], "attnkit explain --help"),
    "too many arguments": (["list", "softmax"], "softmax"),
    "mechanism": (["explain", "sofmax"], KNOWN),
    "backend": (["explain", "softmax", "--backend", "gpu"], "cpu, sdpa, flex, reference"),
    "dtype": (["explain", "softmax", "--dtype", "int8"], "'float16'"),
    "size": (["explain", "softmax", "--h", "0"], "--h"),
    "no number": (["explain", "softmax", "--h", "many"], "--h"),
    "head counts": (["explain", "softmax", "--h", "3", "--g", "2"], "3 query heads and 2 KV heads"),
    "soft-cap": (["explain", "softmax", "--softcap", "-1"], "softcap is -1.0"),
    "mask": (["explain", "softmax", "--mask", "windw(3)"], "windw"),
    "window": (["mask", "window(0)"], "size is 0"),
    "astronomic sizes": (["explain", "softmax", "--h", str(10**15)], "2**48"),
    "memory": (["mask", "bigbird(1073741824, 1)"], "memory"),
    "figure": (["bench", "--only", "K99"], "K1, K2, K3"),
    "threads": (["bench", "--threads", "0"], "--threads"),
    "missing file": (["bench", "--show", "no/such/file.jsonl"], "no/such/file.jsonl"),
    "row": (["compare", "--mechanisms", "mhaa"], "mhaa"),
    "seed": (["compare", "--seeds", "1,x"], "'x'"),
    "tokenizer": (["compare", "--tokenizer", "words"], "words"),
    "name": (["new", "Big-Name"], "Big-Name"),
    "taken name": (["new", "softmax"], "already"),
}


@pytest.mark.parametrize(("arguments", "named"), ERRORS.values(), ids=ERRORS.keys())
@pytest.mark.parametrize("json", [False, True], ids=["text", "json"])
def test_a_users_error_is_one_sentence(run: Any, arguments: list[str], named: str, json: bool) -> None:
    assert named in run(*arguments, *(["--json"] if json and arguments[0] != "nope" else [])).error


@pytest.mark.parametrize("error", [ValueError, TypeError, NotImplementedError, OSError])
def test_sentences_of_our_own_pass_through(run: Any, monkeypatch: pytest.MonkeyPatch, error: type[Exception]) -> None:
    def broken() -> None:
        raise error("got 3, expected 4:\n  first reason\n  second reason")

    monkeypatch.setattr("attnkit.cli.listing.mechanisms", broken)
    assert run("list").error == "got 3, expected 4: first reason; second reason"


def test_a_bug_is_not_dressed_up_as_a_users_error(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def bug() -> None:
        raise RuntimeError("our own mistake")

    monkeypatch.setattr("attnkit.cli.listing.mechanisms", bug)
    with pytest.raises(RuntimeError, match="our own mistake"):
        run("list")


def test_ctrl_c(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("attnkit.cli.listing.mechanisms", stopped)
    done = run("list")
    assert done.code == 130
    assert len(done.err.splitlines()) == 1 and "Traceback" not in done.err


def test_the_module_runs(process: Any) -> None:
    code = "import runpy\nsys.argv[0] = 'attnkit'\nrunpy.run_module('attnkit', run_name='__main__')"
    done = process("explain", "sofmax", before=code)
    assert done.error == f"there is no mechanism 'sofmax': {KNOWN}"


def test_output_to_a_full_disk(process: Any) -> None:
    with Path("/dev/full").open("w") as full:
        done = process("list", stdout=full)
    assert done.error.startswith("No space left on device")


def test_a_pipe_that_closes_early(process: Any) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as pipe:
        done = process("list", "--json", stdout=pipe)
    assert done.err == "" and done.code in (0, 1)


def test_a_reason_in_many_lines_becomes_one() -> None:
    assert cli.sentence(NotImplementedError("no backend can run this\n  cpu: a\n  sdpa: b")).count("\n") == 0
