"""How many keys queries see, in closed form: no table of pairs is made, so a length of millions costs nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


def interval_pairs(m: int, n: int, left: int | None, right: int | None) -> int:
    """Pairs with ``q - left <= k <= q + right``, for the last ``m`` of ``n`` positions; None is no bound."""
    first, last = n - m, n  # positions of the queries; those below 0, of queries without a place, see few keys or none
    high = n * m if right is None else _clamped(first, last, right + 1, n)
    low = 0 if left is None else _clamped(first, last, -left, n)
    return high - low


def _clamped(first: int, last: int, shift: int, most: int) -> int:
    """The sum of ``min(max(q + shift, 0), most)`` for ``q`` from ``first`` up to ``last``."""
    zero, full = (min(max(edge, first), last) for edge in (-shift, most - shift))
    return (full - zero) * (zero + full - 1 + 2 * shift) // 2 + (last - full) * most


class Kept(NamedTuple):
    """What a decoding state of a band keeps: the last ``window`` tokens and the first ``sinks``."""

    window: int
    sinks: int


@dataclass(frozen=True)
class Band:
    """A causal mask by its numbers, for ``cost`` functions in place of a ``Mask``.

    Each query sees the last ``window`` positions, its own included, and the first ``sinks``; all of them without a
    window. ``one_way`` False is no mask at all: every query sees every key.
    """

    window: int | None = None
    sinks: int = 0
    one_way: bool = True
    batches: int = 1
    heads: int = 1

    def visible_pairs(self, m: int, n: int) -> int:
        """Pairs that are visible, for the last ``m`` of ``n`` positions."""
        if not self.one_way:
            return m * n
        left = None if self.window is None else self.window - 1
        pairs = interval_pairs(m, n, left, 0)
        if self.window is None or not self.sinks:
            return pairs
        # A query past the window sees min(sinks, keys that lie before its window) more.
        before = interval_pairs(m, n, None, -self.window)
        beyond = interval_pairs(m, n, None, -self.window - self.sinks)
        return pairs + before - beyond

    def reach(self) -> Kept | None:
        """What a decoding state keeps; None where it keeps everything."""
        return None if self.window is None else Kept(self.window, self.sinks)
