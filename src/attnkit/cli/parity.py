"""``attnkit parity``."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from attnkit.cli.output import Json, console, emit

Dtype = Literal["float32", "bfloat16", "float16"]


def verb(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A folder with safetensors, or a family: llama.")],
    against: Annotated[str | None, typer.Option(help="The implementation that is right by definition: eager.")] = None,
    backends: Annotated[str, typer.Option(help="Attention implementations to check.")] = "attnkit,sdpa",
    caches: Annotated[str, typer.Option(help="Caches to check them with.")] = "dynamic,attnkit",
    dtype: Annotated[Dtype, typer.Option(help="The precision judged; mistakes show best in float32.")] = "float32",
    json: Json = False,
) -> int:
    """Say whether a model's output changes under another attention implementation or another cache.

    Every check judges against the same weights in float64, with the error of the implementation compared with as its
    budget. It says the first layer that went wrong. The exit code is 1 when something changed, so that it can stand in
    a CI.

    Examples:

        attnkit parity llama
        attnkit parity gpt_oss --backends attnkit --caches dynamic,static,attnkit
    """
    # Deferred: Transformers takes seconds to import, and the other verbs do without it.
    import torch
    import transformers

    import attnkit.hf
    from attnkit import parity
    from attnkit.parity.table import as_json, table

    transformers.logging.set_verbosity_error()
    attnkit.hf.register()
    subject = parity.tiny(model, against=against, dtype=getattr(torch, dtype))
    rows = parity.run(subject, parity.plan(_listed(backends), _listed(caches)))
    if json:
        emit({"model": subject.name, "against": subject.against, "dtype": dtype, "rows": [as_json(r) for r in rows]})
    else:
        console().print(table(rows))
    return int(any(row.finding.verdict is parity.Verdict.CHANGED for row in rows))


def _listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]
