"""Runs the command line, in this process for speed or in one of its own for the real thing."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from attnkit.cli import main


@dataclass(frozen=True)
class Outcome:
    """What a command left behind."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    @property
    def error(self) -> str:
        """The sentence of a user's error, which is all that the command may have printed."""
        assert self.code == 2, f"exit code {self.code}: {self.err}"
        assert self.out == ""
        (line,) = self.err.splitlines()
        assert line.startswith("attnkit: ")
        return line.removeprefix("attnkit: ")


Run = Callable[..., Outcome]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """``run("list", "--json")`` in this process; an exception that escapes fails the test."""

    def runner(*arguments: object) -> Outcome:
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return runner


@pytest.fixture
def process() -> Run:
    """``process("list", before="...")`` in a fresh interpreter, which first runs the Python text ``before``."""

    def runner(*arguments: object, before: str = "", stdout: Any = subprocess.PIPE) -> Outcome:
        text = f"import sys\n{before}\nfrom attnkit.cli import main\nsys.exit(main())"
        done = subprocess.run(
            [sys.executable, "-c", text, *map(str, arguments)],
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
        return Outcome(done.returncode, done.stdout or "", done.stderr)

    return runner
