"""What a state hands to attention: keys and values, and where they stand."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from attnkit.masks import Mask, Moved


class Layout(NamedTuple):
    """What a state takes: sequences, KV heads, channels of keys and of values, their dtype and where they are."""

    batch: int
    heads: int
    key_size: int
    value_size: int
    dtype: torch.dtype
    device: torch.device


def layout_of(k: Tensor, v: Tensor) -> Layout:
    """That of keys ``(b, g, n, d)`` and values ``(b, g, n, e)``."""
    batch, heads, _, key_size = k.shape
    return Layout(batch, heads, key_size, v.shape[3], k.dtype, k.device)


@dataclass(frozen=True)
class View:
    """Keys ``(b, g, n, d)`` and values ``(b, g, n, e)`` to attend to; never a copy of the whole state.

    ``positions`` int64 ``(n,)`` are their absolute positions, or None when key ``j`` is at position ``j``.
    ``length`` is the number of tokens the sequence has, the newest included.
    """

    k: Tensor
    v: Tensor
    length: int
    positions: Tensor | None = None

    def for_queries(self, mask: Mask | None, m: int) -> tuple[View, Mask | None]:
        """The keys that the newest ``m`` tokens attend to, and the mask that is left to apply to them.

        A lone query of a sparse mask (strided, dilated) gets just the keys it sees: copying those few costs less than
        passing over the others.
        """
        in_order = self.positions is None
        if mask is None or (in_order and mask.interval() is not None):
            return self, mask
        reach = mask.reach()
        if m == 1 and not in_order and reach is not None and reach.exact:
            return self, None  # the state keeps exactly what this query sees
        keys = torch.arange(self.k.shape[2], device=self.k.device) if self.positions is None else self.positions
        if m == 1 and mask.batches == mask.heads == 1:
            zero = keys.new_zeros(1)
            seen = mask.visible(zero, zero, self.queries(1), keys).nonzero()[:, 0]
            if 2 * len(seen) <= len(keys):
                few = View(self.k.index_select(2, seen), self.v.index_select(2, seen), self.length, keys[seen])
                return few, None
        return self, mask if in_order else Moved(mask, self.queries(m), keys)

    def queries(self, m: int) -> Tensor:
        """Absolute positions of the newest ``m`` tokens, int64 ``(m,)``."""
        return torch.arange(self.length - m, self.length, device=self.k.device)
