"""What a state hands to attention: keys and values, and where they stand."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attnkit.masks import Mask, Moved


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

    def mask(self, mask: Mask | None, m: int) -> Mask | None:
        """``mask`` for the newest ``m`` tokens as queries over these keys."""
        if self.positions is None or mask is None:
            return mask
        reach = mask.reach()
        if m == 1 and reach is not None and reach.exact:
            return None  # the state keeps exactly what this query sees
        return Moved(mask, self.queries(m), self.positions)

    def queries(self, m: int) -> Tensor:
        """Absolute positions of the newest ``m`` tokens, int64 ``(m,)``."""
        return torch.arange(self.length - m, self.length, device=self.k.device)
