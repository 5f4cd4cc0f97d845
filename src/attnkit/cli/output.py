"""What every verb shares: its ``--json`` option, a console, and the way it is stopped."""

from __future__ import annotations

import json
import sys
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]


class StoppedError(Exception):
    """Ctrl-C in a verb that keeps something; the text says what is kept."""


# Wide enough that no table wraps in a file or a pipe.
PIPE_WIDTH = 160


def console(*, stderr: bool = False, width: int | None = None) -> Console:
    """A console as wide as the terminal, or as ``PIPE_WIDTH`` where there is none."""
    stream = sys.stderr if stderr else sys.stdout
    return Console(stderr=stderr, highlight=False, width=width or (None if stream.isatty() else PIPE_WIDTH))


def table(*columns: str, right: tuple[str, ...] = ()) -> Table:
    """A table of one house style; the columns named in ``right`` hold numbers."""
    made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for name in columns:
        made.add_column(name, justify="right" if name in right else "left")
    return made


def emit(value: Any) -> None:
    """Print one JSON value."""
    print(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False))
