"""SnapKV: what the end of the prompt looks at, and its neighbours."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from attnkit.state.policies.base import Evicting, Seen, per_group


@dataclass(frozen=True)
class SnapKV(Evicting):
    """Keeps the observation window, the newest ``observed`` tokens, and those that its queries give most weight to.

    Weights are averaged over the window and then, along the sequence, over ``kernel`` neighbours (``pool="mean"``) or
    their largest is taken (``"max"``), so that what stays is whole phrases; then over the heads of a group. The paper
    compresses a prompt once. Here the window moves along, so that the budget holds while decoding as well.

    Source: Li et al. 2024, arXiv 2404.14469, section 4.
    """

    every: int = field(default=16, kw_only=True)
    observed: int = field(default=32, kw_only=True)
    kernel: int = field(default=5, kw_only=True)
    pool: Literal["mean", "max"] = field(default="mean", kw_only=True)

    ordered = True

    def __post_init__(self) -> None:
        super().__post_init__()
        least = self.observed + self.every - 1
        if self.observed < 1 or self.budget <= least:
            raise ValueError(
                f"{type(self).__name__}: budget is {self.budget}, expected more than {least}: observed {self.observed} "
                f"+ every {self.every} - 1"
            )
        if self.kernel < 1 or self.kernel % 2 == 0 or self.pool not in ("mean", "max"):
            raise ValueError(
                f"{type(self).__name__}: kernel is {self.kernel} and pool {self.pool!r}, expected an odd number and "
                f"'mean' or 'max'"
            )

    @property
    def window(self) -> int:  # type: ignore[override]
        return self.observed

    def score(self, seen: Seen) -> Tensor:
        """The window's mean weight, pooled over neighbours; the window stays. Keys are in the order of the text."""
        assert seen.recent is not None
        before = seen.k.shape[2] - self.observed
        # Neighbours are counted among the tokens before the window, with zeros at both ends, as in the authors' code.
        weights = seen.weights(seen.recent)[..., :before].mean(2)
        if self.pool == "mean":
            pooled = functional.avg_pool1d(weights, self.kernel, 1, self.kernel // 2)
        else:
            pooled = functional.max_pool1d(weights, self.kernel, 1, self.kernel // 2)
        score = per_group(pooled, seen.k.shape[1])
        return functional.pad(score, (0, self.observed), value=torch.inf)
