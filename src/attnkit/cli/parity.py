"""``attnkit parity``."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from attnkit.cli.output import Json, console, emit

Dtype = Literal["float32", "bfloat16", "float16"]
PATIENCE = 2.0
"""Seconds after which a bar shows how far it is."""


def verb(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A folder with safetensors, or a family: llama.")],
    against: Annotated[str | None, typer.Option(help="The implementation that is right by definition: eager.")] = None,
    backends: Annotated[str, typer.Option(help="Attention implementations to check.")] = "attnkit,sdpa",
    caches: Annotated[str, typer.Option(help="Caches to check them with.")] = "dynamic,attnkit",
    text: Annotated[Path | None, typer.Option(help="A text for a folder's model to read.")] = None,
    dtype: Annotated[Dtype, typer.Option(help="The precision judged; mistakes show best in float32.")] = "float32",
    html: Annotated[Path | None, typer.Option(help="Write a report that works offline to this file.")] = None,
    json: Json = False,
) -> int:
    """Say whether a model's output changes under another attention implementation or another cache.

    Every check judges against the same weights in float64, with the error of the implementation compared with as its
    budget. It says the first layer that went wrong and, where one mistake explains it, which. The exit code is 1 when
    something changed, so that it can stand in a CI. Caches are dynamic, static (Transformers' own), attnkit, bf16,
    fp16, int8, fp8, int4 and paged (attnkit.hf.Cache).

    Examples:

        attnkit parity llama
        attnkit parity gpt_oss --backends attnkit --caches dynamic,static,attnkit
        attnkit parity ~/models/my-model --text book.txt --html parity.html
    """
    # Deferred: Transformers takes seconds to import, and the other verbs do without it.
    from attnkit import parity
    from attnkit.parity.html import write_html
    from attnkit.parity.table import as_json, table

    work = parity.plan(_listed(backends), _listed(caches))
    subject = parity.subject(model, against=against, dtype=dtype, text=text)
    with _bar(len(work)) as tell:
        rows = parity.run(subject, work, tell)
    facts = {"model": subject.name, "against": subject.against, "dtype": dtype, "backends": backends, "caches": caches}
    if html is not None:
        write_html(rows, facts, html)
    if json:
        emit({**facts, "backends": _listed(backends), "caches": _listed(caches), "rows": [as_json(r) for r in rows]})
    else:
        console().print(table(rows))
    return int(any(row.finding.verdict is parity.Verdict.CHANGED for row in rows))


def _listed(text: str) -> list[str]:
    return list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))


@contextmanager
def _bar(total: int) -> Iterator[Callable[[object], None]]:
    """A bar of ``total`` steps on a terminal, shown once they have taken a while; it is told of each step."""
    columns = (TextColumn("checking"), BarColumn(), TextColumn("{task.completed}/{task.total}"), TimeRemainingColumn())
    bar, start = Progress(*columns, console=console(stderr=True), transient=True), time.perf_counter()
    task = bar.add_task("checking", total=total)

    def tell(_: object) -> None:
        bar.advance(task)
        if bar.console.is_terminal and time.perf_counter() - start > PATIENCE:
            bar.start()

    try:
        yield tell
    finally:
        if bar.live.is_started:  # one that was never shown would print an empty line
            bar.stop()
