"""Reads this project's docstrings: ``q: (b, h, m, d), float32`` in a section, and a last line ``Source: ...``."""

from __future__ import annotations

import re

from sphinx.application import Sphinx

ENTRY = re.compile(r"^([\w*, ]+): +(.+)$")


def rewrite(lines: list[str]) -> list[str]:
    """The same docstring as NumPy's guide spells it: each name on a line of its own, what it is indented below."""
    out: list[str] = []
    section = ""
    for i, line in enumerate(lines):
        if set(line) == {"-"} and i:
            section = lines[i - 1]
        if line.startswith("Source: "):
            out += ["References", "----------", line.removeprefix("Source: ")]
            section = ""
        elif section in ("Parameters", "Returns", "Raises") and (entry := ENTRY.match(line)):
            out += [entry[1], f"    {entry[2]}"]
        else:
            out.append(line)
    return out


def setup(app: Sphinx) -> dict[str, bool]:
    def process(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
        lines[:] = rewrite(lines)

    app.connect("autodoc-process-docstring", process, priority=400)  # before napoleon, at 500
    return {"parallel_read_safe": True, "parallel_write_safe": True}
