"""What the checks of ``attnkit parity`` are and what they find: small records that the runner and the reports read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from attnkit.parity.subject import Subject


class Verdict(StrEnum):
    """What became of the output."""

    SAME = "same"  # bit for bit what the implementation compared with computes
    ROUNDING = "within rounding"
    CHANGED = "CHANGED"
    REFUSED = "refused"
    NOTHING = "does not apply"


@dataclass(frozen=True)
class Finding:
    """What one check found.

    says: one sentence: the reason, or what is wrong and where; empty when there is nothing to say.
    layer: the first layer where it went wrong.
    share: of the error budget; above 1 is wrong.
    figures: what was measured, by name.
    """

    verdict: Verdict
    says: str = ""
    layer: str | None = None
    share: float | None = None
    figures: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Lane:
    """What is checked: an attention implementation of Transformers by its name, and a cache by one of ``CACHES``."""

    backend: str
    cache: str | None = None


@dataclass(frozen=True)
class Check:
    """One question about a lane.

    measures: half a sentence for people.
    cached: it is asked once for each cache.
    """

    name: str
    measures: str
    run: Callable[[Subject, Lane], Finding]
    cached: bool = False


@dataclass(frozen=True)
class Row:
    """One check of one lane."""

    check: Check
    lane: Lane
    finding: Finding


class DoesNotApplyError(Exception):
    """The question makes no sense for this model; the text says why."""
