"""Results files: one JSON object a line, where and how it was measured first."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
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
        lines.append(line)
    if not lines or lines[0]["kind"] != "run":
        raise ValueError(f"{path} does not start with a run, expected a results file of attnkit bench")
    if lines[0].get("format") != FORMAT:
        raise ValueError(
            f"{path} has format {lines[0].get('format')} (attnkit {lines[0].get('attnkit')}), attnkit "
            f"{attnkit.__version__} reads format {FORMAT}: read it with the version that wrote it, or measure again"
        )
    return lines
