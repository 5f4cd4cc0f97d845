"""H2O: the tokens that got most attention so far, and the newest."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from attnkit.state.policies.base import Evicting, Seen


@dataclass(frozen=True)
class H2O(Evicting):
    """Keeps the ``recent`` newest tokens, half of the budget when None, and the heavy hitters among the others.

    A token's score is the sum over all queries so far of the weight it got; heads of a group are averaged.

    Source: Zhang et al. 2023, arXiv 2306.14048, algorithm 1.
    """

    recent: int | None = field(default=None, kw_only=True)

    totals = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.newest <= self.budget:
            raise ValueError(f"H2O: recent is {self.recent}, expected 1 to {self.budget}, the budget, or None")

    @property
    def newest(self) -> int:
        """Tokens that stay whatever their score."""
        return max(1, self.budget // 2) if self.recent is None else self.recent

    def watch(self, seen: Seen) -> None:
        assert seen.totals is not None
        seen.totals.add_(seen.received())

    def score(self, seen: Seen) -> Tensor:
        """The sum of weights; the newest stay."""
        assert seen.totals is not None
        return seen.totals.masked_fill(seen.positions >= seen.length - self.newest, torch.inf)
