"""Runs every check for every pair of backend and cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from attnkit.parity import cached, calls, forward, text
from attnkit.parity.caches import CACHES
from attnkit.parity.record import Check, DoesNotApplyError, Finding, Lane, Row, Verdict
from attnkit.parity.subject import Subject, first_sentence, usable

CHECKS: tuple[Check, ...] = (*calls.CHECKS, *forward.CHECKS, *cached.CHECKS, *text.CHECKS)


def plan(backends: Sequence[str], caches: Sequence[str], checks: Sequence[Check] = CHECKS) -> list[tuple[Check, Lane]]:
    """Every check with every lane, in the order of the report; raises ValueError for a cache that there is none of."""
    for cache in caches:
        if cache not in CACHES:
            raise ValueError(f"there is no cache {cache!r}, expected some of {', '.join(CACHES)}")
    if not backends or not caches:
        raise ValueError("there is nothing to check: name at least one backend and one cache")
    return [
        (check, Lane(backend, cache))
        for check in checks
        for cache in (caches if check.cached else (None,))
        for backend in backends
    ]


def run(subject: Subject, work: Sequence[tuple[Check, Lane]], tell: Callable[[Row], None] | None = None) -> list[Row]:
    """A row for each check and lane of ``work``; ``tell`` hears of each when it is there."""
    usable([lane.backend for _, lane in work])
    rows = []
    for check, lane in work:
        rows.append(Row(check, lane, _found(subject, check, lane)))
        if tell:
            tell(rows[-1])
    return rows


def _found(subject: Subject, check: Check, lane: Lane) -> Finding:
    try:
        return check.run(subject, lane)
    except DoesNotApplyError as why:
        return Finding(Verdict.NOTHING, str(why))
    except (NotImplementedError, ValueError) as refusal:
        return Finding(Verdict.REFUSED, first_sentence(refusal))
    except Exception as error:  # somebody else's implementation may raise anything, and then there is no output
        return Finding(Verdict.CHANGED, f"no output, {type(error).__name__}: {first_sentence(error)}")
