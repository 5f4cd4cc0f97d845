"""Results files: one JSON object a line, where and how it was measured first."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from math import log
from pathlib import Path
from statistics import linear_regression
from typing import Any

import attnkit

FORMAT = 1

Line = dict[str, Any]


@contextmanager
def written(path: Path | None) -> Iterator[Callable[[Line], None]]:
    """Write lines beside ``path`` and put them in its place when all are there: never half a file over a good one.

    What was measured before Ctrl-C stays in ``unfinished(path)``. Without a path nothing is written.
    """
    if path is None:
        yield lambda line: None
        return
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "is a folder, expected the name of a results file", str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    part = unfinished(path)
    try:
        with part.open("w", encoding="utf-8") as file:

            def write(line: Line) -> None:
                file.write(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n")
                file.flush()

            yield write
            os.fsync(file.fileno())
        part.replace(path)
    except Exception:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        raise


def unfinished(path: Path) -> Path:
    return path.with_name(f"{path.name}.part")


def read(path: Path) -> list[Line]:
    """The lines of a results file. Raises ``ValueError`` for one that is damaged, empty or of another format."""
    lines = []
    for number, text in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        try:
            line = json.loads(text)
        except ValueError as error:
            raise ValueError(f"{path} line {number} is no JSON, expected a results file of attnkit bench") from error
        if not isinstance(line, dict) or "kind" not in line:
            raise ValueError(f"{path} line {number} has no kind, expected a results file of attnkit bench")
        lines.append(upgraded(line))
    if not lines or lines[0]["kind"] != "run":
        raise ValueError(f"{path} does not start with a run, expected a results file of attnkit bench")
    if lines[0].get("format") != FORMAT:
        raise ValueError(
            f"{path} has format {lines[0].get('format')} (attnkit {lines[0].get('attnkit')}), attnkit "
            f"{attnkit.__version__} reads format {FORMAT}: read it with the version that wrote it, or measure again"
        )
    return lines


def upgraded(line: Line) -> Line:
    """A line of the first benches, which knew no peer but torch's SDPA, as one is written today."""
    if line["kind"] != "kernel" or "suite" in line:
        return line
    suite = "decode" if line["id"] == "K5" else "softmax"
    kept = {name: value for name, value in line.items() if name not in ("sdpa_ms", "flex_ms")}
    also = {"flex": line["flex_ms"]} if line.get("flex_ms") else None
    return kept | {
        "suite": suite,
        "peer": "SDPA",
        "peer_ms": line["sdpa_ms"],
        "also_ms": also,
        "floor_most": None,
        "floor_exponent": None,
        "refused": None,
    }


@dataclass(frozen=True)
class Exponent:
    """The power of the length that the times of one piece of work grow with, by least squares; 1 is linear."""

    id: str
    work: str
    lengths: tuple[int, ...]
    exponent: float
    within: float

    @property
    def holds(self) -> bool:
        return abs(self.exponent - 1) <= self.within


def split(work: str) -> tuple[str, int]:
    """The words of a piece of work without its length, and the length, which stands last."""
    words, _, n = work.rpartition(" n")
    return words, int(n)


def exponents(lines: Sequence[Line]) -> list[Exponent]:
    """The exponent of every piece of work that is judged by one and was timed at three lengths or more."""
    times: dict[tuple[str, str], list[tuple[int, float]]] = {}
    bounds: dict[tuple[str, str], float] = {}
    for line in lines:
        if line["kind"] == "kernel" and line["floor_exponent"] and line["ours_ms"] and not line["wrong"]:
            words, n = split(line["work"])
            bounds[line["id"], words] = line["floor_exponent"]
            times.setdefault((line["id"], words), []).append((n, line["ours_ms"]))
    found = []
    for (figure, words), points in times.items():
        if len(points) >= 3:
            x, y = ([log(value) for value in axis] for axis in zip(*points, strict=True))
            lengths = tuple(n for n, _ in points)
            found.append(Exponent(figure, words, lengths, linear_regression(x, y).slope, bounds[figure, words]))
    return found
