"""Two commits of a checkout side by side: the other one is built in a worktree of its own, and both take turns."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch

from attnkit import native
from attnkit.bench.host import PACKAGE, checkout, provenance
from attnkit.bench.results import Line
from attnkit.bench.sizes import Case

ROUNDS = 11
DRIVER = Path(__file__).with_name("driver.py")


def compare(chosen: Sequence[Case], ref: str) -> Iterator[Line]:
    """The lines of a results file: where and how, then for each case the times of ``ref`` and of this package.

    Raises ``ValueError`` outside a checkout, for a commit that git does not know, and where it does not build.
    """
    root = checkout()
    if root is None:
        raise ValueError("--base compares commits of a source checkout, and this attnkit is installed: run it from one")
    settings = {"base": ref, "work": [case.work for case in chosen], "threads": torch.get_num_threads()}
    yield provenance(settings)
    with ExitStack() as stack:
        old_package = stack.enter_context(built(root, ref))
        old, new = (stack.enter_context(_Driver(package)) for package in (old_package, PACKAGE))
        for case in chosen:
            yield {"kind": "pair", "id": case.id, "suite": case.suite, "work": case.work, **_timed(case, old, new)}


def _timed(case: Case, old: _Driver, new: _Driver) -> dict[str, Any]:
    about: dict[str, Any] = {"old_ms": None, "new_ms": None, "ratio": None, "spread": None, "refused": None}
    for name, driver in (("base", old), ("this commit", new)):
        refused = driver.ask(prepare=[case.id, case.work])["refused"]
        if refused:
            return about | {"refused": f"{name}: {refused}", "holds": False}
    times: list[tuple[float, float]] = []
    for turn in range(ROUNDS):
        # Who goes first changes with the turn: the second may find the clock and the caches as the first left them.
        drivers = (old, new) if turn % 2 == 0 else (new, old)
        seconds = [driver.ask(time=True)["seconds"] for driver in drivers]
        times.append((seconds[0], seconds[1]) if turn % 2 == 0 else (seconds[1], seconds[0]))
    ratios = [before / after for before, after in times]
    first, middle, third = quantiles(ratios)
    rounded = {
        "old_ms": 1e3 * median(before for before, _ in times),
        "new_ms": 1e3 * median(after for _, after in times),
        "ratio": middle,
        "spread": (third - first) / middle,
    }
    return about | {name: float(f"{value:.4g}") for name, value in rounded.items()} | {"holds": True}


@contextmanager
def built(root: Path, ref: str) -> Iterator[Path]:
    """The package folder of another commit, with its kernels compiled, for the length of a ``with`` block."""
    if ref.startswith("-"):
        raise ValueError(f"--base got {ref!r}, expected a commit, a branch or a tag of this checkout")
    with tempfile.TemporaryDirectory(prefix="attnkit-base-") as folder:
        source, build = Path(folder, "source"), Path(folder, "build")
        _run("git", "-C", str(root), "worktree", "add", "--detach", "--quiet", str(source), ref)
        try:
            _run("cmake", "-S", str(source), "-B", str(build), "-DCMAKE_BUILD_TYPE=Release")
            _run("cmake", "--build", str(build), "--target", "attnkit_native", "-j", str(os.cpu_count() or 1))
            package = source / "src" / "attnkit"
            (build / native.LIBRARY).replace(package / "native" / native.LIBRARY)
            yield package
        finally:
            _run("git", "-C", str(root), "worktree", "remove", "--force", str(source))


def _run(*command: str) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise ValueError(f"--base needs {command[0]}, which does not run: {error.strerror}") from error
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip() or "nothing").splitlines()[-1]
        raise ValueError(f"--base: {' '.join(command[:2])} failed, it said: {said}")


class _Driver:
    """A process that times calls of one package, one question and one answer a line."""

    def __init__(self, package: Path) -> None:
        settings = {"threads": torch.get_num_threads(), "level": native.get_level()}
        command = [sys.executable, str(DRIVER), str(package), str(PACKAGE / "bench"), json.dumps(settings)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __enter__(self) -> _Driver:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()

    def ask(self, **question: Any) -> dict[str, Any]:
        """Send a question and wait for its answer."""
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            raise ValueError("--base: the process that times one of the commits ended, see what it wrote above")
        found: dict[str, Any] = json.loads(answer)
        return found
