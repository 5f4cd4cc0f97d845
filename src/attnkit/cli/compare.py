"""``attnkit compare``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from attnkit.cli.output import Json, StoppedError

Mechanisms = Annotated[
    str | None,
    typer.Option(help="Rows to compare: presets such as mha,gqa; a mechanism for all its presets; hybrids."),
]


def verb(
    files: Annotated[list[Path] | None, typer.Argument(metavar="FILE", help="More text files to learn.")] = None,
    text: Annotated[list[Path] | None, typer.Option(help="Text files to learn: --text FILE...")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Eight rows and one seed, in minutes on two cores.")] = False,
    mechanisms: Mechanisms = None,
    seeds: Annotated[str | None, typer.Option(help="Seeds to train with, such as 0,1,2.")] = None,
    tokenizer: Annotated[str | None, typer.Option(help="bytes, or bpe trained on the text.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for results.jsonl and report.html.")] = Path("attnkit-compare"),
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in the folder.")] = False,
    json: Json = False,
) -> None:
    """Train small models that differ only in their attention, time them, and write a report.

    Equal parameters and equal tokens for all. Measured are bits per byte on real text (Shakespeare's plays unless
    --text names files), recall, copying and needle retrieval, tokens a second, milliseconds a decoded token at growing
    context, and bytes of cache. The report is one HTML file that works offline. A stopped run goes on with --resume.

    Examples:

        attnkit compare --quick
        attnkit compare --quick --mechanisms mha,gqa,window --text novel.txt letters.txt
        attnkit compare --seeds 0,1,2 --out results --resume
    """
    # Deferred: training needs packages that the other verbs do without, and doctor must print when they are broken.
    from attnkit import compare
    from attnkit.compare.options import CompareOptions

    options = CompareOptions(
        text=(*(text or ()), *(files or ())),
        quick=quick,
        mechanisms=_listed(mechanisms),
        seeds=tuple(_seed(part) for part in _listed(seeds)),
        tokenizer=tokenizer,
        out=out,
        resume=resume,
        json=json,
    )
    try:
        compare.run(options)
    except KeyboardInterrupt:
        raise StoppedError(f"every finished row is in {out}: the same command with --resume goes on") from None


def _listed(text: str | None) -> tuple[str, ...]:
    return tuple(part.strip() for part in (text or "").split(",") if part.strip())


def _seed(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"a seed is {text!r}, expected whole numbers such as 0,1,2") from None
