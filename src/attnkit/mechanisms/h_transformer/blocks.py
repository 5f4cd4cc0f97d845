"""How many levels a sequence has."""

from __future__ import annotations


def levels(n: int, block: int) -> int:
    """Levels of ``n`` tokens: the smallest count, at least 1, with ``block 2^count >= n``."""
    count = 1
    while block << count < n:
        count += 1
    return count
