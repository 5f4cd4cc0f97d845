"""Quest: everything is kept, and each step reads the pages that can matter most to its query."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from attnkit.state.policies.base import Policy, Seen, wide

DENSE_LAYERS = 2
LEAST_PAGES = 3


@dataclass(frozen=True)
class Quest(Policy):
    """Reads whole pages of ``page`` tokens, ``budget`` tokens at most, the newest page always among them.

    Candidates are pages: ``score`` (b, g, pages) is the most that the logit of any key on the page can be, by the least
    and the greatest that each channel has there; of a group the head with the highest. Prompts see everything, as do
    the first two layers of a model.

    Source: Tang et al. 2024, arXiv 2406.10774, algorithm 1.
    """

    budget: int
    page: int = field(default=16, kw_only=True)

    def __post_init__(self) -> None:
        if self.page < 1 or self.budget < LEAST_PAGES * self.page:
            raise ValueError(
                f"Quest: budget is {self.budget} and page {self.page}, expected at least {LEAST_PAGES} pages"
            )

    def score(self, seen: Seen) -> Tensor:
        """``sum_c max(q_c min_c, q_c max_c)`` of ``Seen.k`` = the least and greatest (b, g, 2, pages, d)."""
        low, high = wide(seen.k).unbind(2)
        q = wide(seen.q[:, :, -1]).unflatten(1, (low.shape[1], -1))
        # For a positive channel the greatest key counts, for a negative one the least: two products.
        bound: Tensor = q.clamp(min=0) @ high.mT + q.clamp(max=0) @ low.mT
        return bound.amax(2)

    def for_layer(self, layer: int, layers: int) -> Quest | None:
        return None if layer < DENSE_LAYERS else self

    def state(
        self,
        batch: int,
        heads: int,
        capacity: int,
        key_size: int,
        value_size: int | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        limit: int | None = None,
    ) -> Any:
        from attnkit.state.policies.whole import PagewiseState

        return PagewiseState(
            self, batch, heads, capacity, key_size, value_size, dtype=dtype, device=device, limit=limit
        )
