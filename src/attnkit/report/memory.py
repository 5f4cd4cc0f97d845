"""Recall against the bytes of state: do states of fixed size lose what growing caches keep, as pairs become more?

All of it is asked at one length, of the models that were trained on the tasks, so that a row has one size of state and
only the number of pairs changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from attnkit.report import units
from attnkit.report.measures import LEARNED, Measure, accuracy
from attnkit.report.noise import Sample
from attnkit.report.results import Place, Results, Row, joined


@dataclass(frozen=True)
class Kept:
    """What one row recalls of few and of many pairs, from so many bytes of state, which grow with length or do not."""

    row: Row
    bytes: int
    fixed: bool
    few: Sample
    many: Sample
    learned: bool
    """Few pairs are recalled, so that more of them can show what the state holds."""
    falls: bool
    """Recall of many pairs is worse than of few, beyond the noise."""

    def __str__(self) -> str:
        return f"{self.row.label} ({units.size(self.bytes)})"

    @property
    def fall(self) -> str:
        return (
            f"{self.row.label} ({units.size(self.bytes)}, {units.percent(self.few.mean)} to "
            f"{units.percent(self.many.mean)})"
        )


@dataclass(frozen=True)
class Recall:
    """The rows whose bytes of state are known: with the fewest pairs of one length, and the most that a row learned."""

    few: Measure
    many: Measure
    margin: float
    rows: tuple[Kept, ...]

    @property
    def places(self) -> tuple[Place, Place]:
        assert self.few.place is not None and self.many.place is not None
        return self.few.place, self.many.place


def recall(results: Results) -> Recall | None:
    """What the run says at the longest length that was asked with several numbers of pairs; None if there is none."""
    measured = [accuracy(results, "recall", place) for place in results.places("recall")]
    lengths = [m.place.length for m in measured if m.place]
    several = [length for length in lengths if lengths.count(length) > 1]
    at = [m for m in measured if several and m.place and m.place.length == max(several)]
    learned = [m for m in at if max(sample.mean for sample in m.samples.values()) >= LEARNED]
    if len(learned) < 2:
        return None
    few, many = learned[0], learned[-1]
    rows = tuple(kept for row in results.rows if (kept := _kept(row, few, many)))
    return Recall(few, many, max(few.margin, many.margin), rows) if rows else None


def _kept(row: Row, few: Measure, many: Measure) -> Kept | None:
    assert many.place is not None
    size = row.state_bytes("recall", many.place)
    if size is None or row.id not in few.samples or row.id not in many.samples:
        return None
    easy, hard = few.samples[row.id], many.samples[row.id]
    falls = easy.mean > hard.mean and few.noise.separates(easy, hard) and many.noise.separates(easy, hard)
    return Kept(row, size, row.fixed("recall"), easy, hard, easy.mean >= LEARNED, falls)


def paragraph(results: Results) -> str | None:
    """Whether fixed states lose recall as pairs grow, from the numbers; None where no state of the run is fixed."""
    found = recall(results)
    if found is None or not any(kept.fixed for kept in found.rows):
        return None
    few, many = found.places
    span = f"from {few.pairs} to {many.pairs} pairs in {many.length} tokens"
    fixed = [kept for kept in found.rows if kept.fixed and kept.learned]
    growing = [kept for kept in found.rows if not kept.fixed and kept.learned]
    lost, kept_up = _split(fixed)
    said = []
    if lost:
        which = "Some states" if kept_up else "States"
        said.append(f"{which} of fixed size lose recall {span}: {joined([kept.fall for kept in lost])}.")
        if kept_up:
            said.append(f"No loss beyond the noise shows for {_named(kept_up)}, fixed as well.")
    elif kept_up:
        said.append(f"No state of fixed size loses recall beyond the noise {span}: {_named(kept_up)}.")
    if fixed and growing:
        falling, steady = _split(growing)
        said += [f"Growing caches that lose nothing beyond the noise: {_named(steady)}."] if steady else []
        said += [f"Growing caches that lose too: {joined([kept.fall for kept in falling])}."] if falling else []
    unlearned = [kept for kept in found.rows if kept.fixed and not kept.learned]
    if unlearned:
        said.append(
            f"Not even {few.pairs} pairs are recalled from the fixed state of {_named(unlearned)}, so more pairs do "
            "not show what it holds."
        )
    return " ".join([*said, *_smallest(found), _counted(found)])


def _smallest(found: Recall) -> list[str]:
    """The smallest state with the recall of the best, where some row falls behind."""
    sizes = {kept.row.id: kept for kept in found.rows}
    leaders = [sizes[row] for row in found.many.leaders() if row in sizes]
    if not leaders or len(leaders) == len(sizes):
        return []
    chosen = min(leaders, key=lambda kept: kept.bytes)
    return [
        f"The smallest state whose recall of {found.places[1].pairs} pairs cannot be distinguished from the best is "
        f"that of {chosen}."
    ]


def _counted(found: Recall) -> str:
    return f"Differences under {units.rounded(100 * found.margin, 2)} points are not counted."


def _split(rows: Sequence[Kept]) -> tuple[list[Kept], list[Kept]]:
    """Those that fall, and the others."""
    return [kept for kept in rows if kept.falls], [kept for kept in rows if not kept.falls]


def _named(rows: Sequence[Kept]) -> str:
    return joined([str(kept) for kept in rows])
