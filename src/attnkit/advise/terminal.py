"""The answer as tables for a terminal."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from attnkit.advise.alternatives import EFFORTS
from attnkit.advise.answer import Answer
from attnkit.advise.ranking import Judged
from attnkit.advise.sentences import asked, headline, hints, reasons
from attnkit.advise.words import count, length, seconds, size


def table(*columns: str, left: int = 1) -> Table:
    """A table of the house style, whose first ``left`` columns are words."""
    made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for i, name in enumerate(columns):
        made.add_column(name, justify="left" if i < left else "right", no_wrap=i > 0)
    return made


def show(answer: Answer, out: Console) -> None:
    """Print the answer."""
    for part in _parts(answer):
        out.print(part)


def _parts(answer: Answer) -> Iterator[RenderableType]:
    model, hardware = answer.model, answer.hardware
    yield Text.assemble((model.name, "bold"), f"  {count(model.weights)} weights, {model.shape}")
    yield Text(f"{hardware.title}: {size(hardware.memory)}, {hardware.bandwidth / 1e9:,.0f} GB/s  ({hardware.source})")
    yield Text(f"{asked(answer)}\n")
    yield Text.assemble(("Answer  ", "bold green"), headline(answer), "\n")
    yield _columns(answer, answer.base)
    if answer.chosen is not answer.base:
        yield Text()
        yield _columns(answer, answer.chosen)
    yield Text()
    yield _ranking(answer)
    for hint in hints(answer):
        yield Text(f"\n{hint}", style="dim")


def _columns(answer: Answer, judged: Judged) -> RenderableType:
    estimate = judged.estimate
    made = table(judged.alternative.title, *(f"{column.name} {length(column.tokens)}" for column in estimate.columns))
    train = answer.load.train
    rows = (
        ("activations of a sequence" if train else "cache of a request", [size(c.cache) for c in estimate.columns]),
        ("sequences that fit" if train else "requests that fit", [f"{c.fit:,}" for c in estimate.columns]),
        ("step, at least" if train else "prompt, at least", [seconds(c.prefill.seconds) for c in estimate.columns]),
        ("  bound by", [f"{c.prefill.bound}" for c in estimate.columns]),
        ("step, at least", [seconds(c.decode.seconds) for c in estimate.columns]),
        ("  bound by", [f"{c.decode.bound} of {c.decode.part}" for c in estimate.columns]),
    )
    for name, cells in rows[: 4 if train else 6]:
        made.add_row(name, *cells)
    if train:
        words = f"weights with gradients and optimizer {size(estimate.weights)}, free {size(estimate.free)} of "
        return Group(made, Text(f"{words}{size(estimate.usable)}", style="dim"))
    memory = (
        f"weights {size(estimate.weights)}, activations {size(estimate.activations)}, free for the cache "
        f"{size(estimate.free)} of {size(estimate.usable)}; a token adds {estimate.token:,} bytes"
    )
    return Group(made, Text(memory, style="dim"))


def _ranking(answer: Answer) -> RenderableType:
    made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    made.add_column("")
    for name in ("bytes at p99" if answer.load.train else "cache at p99", "fit", "prompt", "step"):
        made.add_column(name, justify="right", no_wrap=True)
    made.add_column("why not")
    for effort in EFFORTS:
        ours = [one for one in answer.ranked if one.alternative.effort == effort]
        if ours and effort != "nothing":
            made.add_row(Text(f"takes {effort}", style="bold"))
        for judged in ours:
            one, p99 = judged.alternative, judged.estimate.column("p99")
            best = judged is answer.chosen
            shade = "" if judged.meets else "dim"
            mark = "bold green" if judged.meets else "bold yellow"
            made.add_row(
                one.title,
                size(p99.cache),
                f"{p99.fit:,}",
                seconds(p99.prefill.seconds),
                seconds(p99.decode.seconds),
                "chosen" if best else reasons(answer, one.name),
                style=mark if best else shade,
            )
    if answer.unsuited:
        made.add_row(Text("does not apply", style="bold"))
    for other in answer.unsuited:
        made.add_row(other.title, "", "", "", "", other.why, style="dim")
    return made
