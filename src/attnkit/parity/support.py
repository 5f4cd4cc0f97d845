"""The table of families in the documentation: what runs on ``attn_implementation="attnkit"``, as the checks find it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from attnkit.parity.record import Lane, Row, Verdict
from attnkit.parity.runner import CHECKS, run
from attnkit.parity.tiny import tiny

# Columns, each with the checks and the cache behind it.
COLUMNS: dict[str, tuple[tuple[str, ...], str | None]] = {
    "forward": (("visible keys", "layers"), None),
    "left padding": (("left padding",), None),
    "packed": (("packed",), None),
    "gradients": (("gradients",), None),
    "DynamicCache": (("decode",), "dynamic"),
    "StaticCache": (("decode",), "static"),
    "attnkit.hf.Cache": (("decode",), "attnkit"),
}
_WORDS = {
    Verdict.SAME: "yes",
    Verdict.ROUNDING: "yes",
    Verdict.CHANGED: "**wrong**",
    Verdict.REFUSED: "refused",
    Verdict.NOTHING: "–",
}
_WORST = (Verdict.CHANGED, Verdict.REFUSED, Verdict.ROUNDING, Verdict.SAME, Verdict.NOTHING)


@dataclass(frozen=True)
class Support:
    """One family: a word for each of ``COLUMNS``, and the reasons for whatever is not a yes, with the columns."""

    family: str
    words: tuple[str, ...]
    reasons: tuple[tuple[str, str], ...]


def support(family: str) -> Support:
    """Run the checks of the table for one family."""
    by_name = {check.name: check for check in CHECKS}
    work = [(by_name[name], Lane("attnkit", cache)) for names, cache in COLUMNS.values() for name in names]
    rows = run(tiny(family), work)
    words, reasons = [], dict[str, list[str]]()
    for column, (names, cache) in COLUMNS.items():
        row = _worst([row for row in rows if row.check.name in names and row.lane.cache == cache])
        words.append(_WORDS[row.finding.verdict])
        if words[-1] != "yes":
            reasons.setdefault(row.finding.says, []).append(column)
    return Support(family, tuple(words), tuple((", ".join(columns), why) for why, columns in reasons.items()))


def _worst(rows: Sequence[Row]) -> Row:
    return min(rows, key=lambda row: _WORST.index(row.finding.verdict))


def table_line(found: Support) -> str:
    """The family's line of the table, in Markdown."""
    return f"| {found.family} | {' | '.join(found.words)} |"


def reason_line(found: Support) -> str | None:
    """The family's reasons as an item of a list; None when there are none."""
    every = len(COLUMNS)
    said = [why if columns.count(",") + 1 == every else f"{columns}: {why}" for columns, why in found.reasons]
    return f"- {found.family}: {'; '.join(said)}." if said else None


def page(families: Iterable[Support]) -> str:
    """The table and the reasons below it, in Markdown."""
    found = list(families)
    head = f"| family | {' | '.join(COLUMNS)} |\n|{' --- |' * (len(COLUMNS) + 1)}\n"
    lines = "\n".join(map(table_line, found))
    reasons = "\n".join(line for line in map(reason_line, found) if line)
    return f"{head}{lines}\n\n## What is not a yes, and why\n\n{reasons}\n"
