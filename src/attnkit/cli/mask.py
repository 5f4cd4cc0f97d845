"""``attnkit mask``."""

from __future__ import annotations

from typing import Annotated

import typer

from attnkit.cli.output import Json, emit
from attnkit.masks.text import parse

MaskText = Annotated[
    str,
    typer.Argument(help='A mask, such as "causal() & (window(128) | global_tokens(4))".', metavar="MASK"),
]


def verb(
    text: MaskText,
    n: Annotated[int | None, typer.Option("--n", min=1, max=1 << 20, help="Keys; chosen to show the shape.")] = None,
    m: Annotated[
        int | None, typer.Option("--m", min=1, max=1 << 20, help="Queries, the last ones; all if absent.")
    ] = None,
    cells: Annotated[int, typer.Option(min=4, max=200, help="Rows and columns of the picture at most.")] = 24,
    json: Json = False,
) -> None:
    """Draw a mask: ■ all pairs visible, ▪ some, · none; queries down, keys across.

    Masks combine with & (both), | (either) and ~ (not). A window counts the current key.

    Examples:

        attnkit mask "causal() & window(8)"
        attnkit mask "(window(128) | global_tokens(4)) & causal()" --n 2048
        attnkit mask "strided(16)" --n 64 --json
    """
    mask = parse(text)
    keys = n or mask.length or mask.extent()
    queries = m or keys
    picture = mask.draw(keys, queries, cells)
    if not json:
        print(picture)
        return
    pairs = mask.visible_pairs(queries, keys) / (mask.batches * mask.heads)
    emit(
        {
            "mask": repr(mask),
            "queries": queries,
            "keys": keys,
            "visible_share": pairs / (queries * keys),
            "picture": picture.splitlines()[1:],
        }
    )
