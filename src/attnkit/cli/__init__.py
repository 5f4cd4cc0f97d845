"""The command line: one file a verb. A user's error is one sentence on standard error and exit code 2."""

from __future__ import annotations

import errno
import logging
import os
import sys
from collections.abc import Iterable, Sequence
from importlib import import_module
from typing import Annotated

import typer
from typer.exceptions import TyperException

import attnkit
from attnkit.cli.output import StoppedError

# What torch says in a plain RuntimeError.
OUT_OF_MEMORY = ("can't allocate memory", "Storage size calculation overflowed")

app = typer.Typer(
    help="attnkit: the attention toolkit. Each command has its own --help with examples, and --json for machines.",
    rich_markup_mode="markdown",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
# The verbs by name, and the files they are in.
VERBS = {
    "list": "listing",
    "explain": "explain",
    "mask": "mask",
    "doctor": "doctor",
    "advise": "advise",
    "bench": "bench",
    "compare": "compare",
    "parity": "parity",
    "new": "new",
}


def _add(names: Iterable[str]) -> None:
    """Add verbs to ``app``; a file is imported here, so that a verb that needs no torch does not wait for it."""
    added = {command.name for command in app.registered_commands}
    for name in names:
        if name not in added:
            app.command(name)(import_module(f"attnkit.cli.{VERBS[name]}").verb)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(attnkit.__version__)
        raise typer.Exit


@app.callback()
def _global(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    """Options of attnkit itself."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    0 when all went well, 1 when a check that was asked for failed, 2 for a user's error, 130 when stopped by Ctrl-C.
    """
    given = sys.argv[1:] if arguments is None else list(arguments)
    try:
        _add([given[0]] if given and given[0] in VERBS else VERBS)
        code = app(given or ["--help"], prog_name="attnkit", standalone_mode=False) or 0
        if code == 130:
            print("attnkit: stopped, nothing was half written", file=sys.stderr)
        sys.stdout.flush()
        return int(code)
    except StoppedError as stop:
        print(f"attnkit: stopped, {stop}", file=sys.stderr)
        return 130
    except (TyperException, ValueError, TypeError, NotImplementedError, OSError, ImportError, MemoryError) as error:
        if isinstance(error, OSError) and error.errno in (errno.EPIPE, errno.ENOSPC):
            _drop_output()
        if isinstance(error, BrokenPipeError):  # `attnkit list | head` is no error
            return 0
        logging.getLogger("attnkit").debug("the error in full", exc_info=True)
        print(f"attnkit: {sentence(error)}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        if not any(sign in str(error) for sign in OUT_OF_MEMORY):
            raise
        print(f"attnkit: {sentence(MemoryError())}", file=sys.stderr)
        return 2


def sentence(error: Exception) -> str:
    """One line that says what was wrong."""
    if isinstance(error, TyperException):
        context = getattr(error, "ctx", None)
        hint = f": see {context.command_path} --help" if context else ""
        return error.format_message().rstrip(".") + hint
    if isinstance(error, OSError) and error.strerror:
        cure = {
            errno.ENOSPC: ": free some space or write to another disk",
            errno.EROFS: ": write to another folder",
            errno.EACCES: ": write to another folder or change its permissions",
        }.get(error.errno or 0, "")
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror}{cure}"
    if isinstance(error, MemoryError):
        return "this needs more memory than there is: choose smaller sizes"
    head, *rest = str(error).splitlines() or [type(error).__name__]
    return f"{head.rstrip(':')}: {'; '.join(line.strip() for line in rest)}" if rest else head


def _drop_output() -> None:
    """Send what is still buffered nowhere, or Python would fail on it once more while it shuts down."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError):  # standard output is no file, as under a test: there is nothing to flush
        pass
