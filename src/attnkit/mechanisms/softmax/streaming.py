"""Positions inside the cache (StreamingLLM, arXiv 2309.17453): a key stands at its slot, not where it was in the text.

When the query at position ``i`` is processed, the cache holds the first ``sinks`` tokens and the last ``window``, one
after the other. Until it is full, slot and position are the same. Afterwards the query is always in the last slot,
``sinks + window - 1``: keys of the window are as far from it as in the text, and the first tokens stay near.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnkit.masks.algebra import Reach
from attnkit.positions import Rotary


def by_slot(rotary: Rotary, q: Tensor, k: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """One query and the keys of its cache, turned by their slots.

    q: (b, h, 1, d). k: (b, g, n, d), all that the query sees, in any order. positions: int64 (n,), theirs in the text.
    """
    slots = positions.argsort().argsort()
    return rotary.rotate(q, slots.new_full((1,), len(slots) - 1)), rotary.rotate(k, slots)


def by_distance(
    rotary: Rotary, q: Tensor, k: Tensor, queries: Tensor, keys: Tensor, reach: Reach
) -> tuple[Tensor, Tensor]:
    """Many queries at once, each with a cache of its own: pairs of twice the size with the products of all slots.

    Only differences of positions count. So the first half turns by positions in the text and is 0 in the first tokens;
    the second half holds the first tokens, and no query of it stands further than in the last slot.

    q: (b, h, m, d), k: (b, g, n, d), not turned yet. queries, keys: int64 (m,), (n,), their positions in the text.
    """
    last_slot = reach.sinks + reach.window - 1
    q = torch.cat([rotary.rotate(q, queries), rotary.rotate(q, queries.clamp(max=last_slot))], -1)
    k, first = rotary.rotate(k, keys), (keys < reach.sinks)[:, None]
    return q, torch.cat([k.masked_fill(first, 0), k.masked_fill(~first, 0)], -1)
