"""A results file that is added to: a run that was stopped goes on where it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from attnkit.bench.results import Line, read


class Lines:
    """The lines of ``path``, which begins with ``head``; a file of other settings is refused."""

    def __init__(self, path: Path, head: Line) -> None:
        self.path = path
        if path.is_file():
            self.lines = read(path)
            if (old := self.lines[0]["settings"]) != head["settings"]:
                raise ValueError(
                    f"{path} was measured with {old}, expected {head['settings']}: name another with --out"
                )
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.lines = []
            self.add(head)

    def add(self, line: Line) -> None:
        """Write one line, at once."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n")
        self.lines.append(line)

    def found(self, **wanted: Any) -> list[Line]:
        """The lines that say all of ``wanted``."""
        return [line for line in self.lines if all(line.get(name) == value for name, value in wanted.items())]
