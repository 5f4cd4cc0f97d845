"""TOVA: the tokens that the newest query looks at."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attnkit.state.policies.base import Evicting, Seen


@dataclass(frozen=True)
class TOVA(Evicting):
    """Lets go of the token with the least weight from the newest query, averaged over all heads: all keep the same.

    Source: Oren et al. 2024, arXiv 2401.06104, section 3.2.
    """

    def score(self, seen: Seen) -> Tensor:
        """The newest query's weight, the mean of all heads; the newest token stays."""
        weights = seen.weights(seen.q[:, :, -1:])[:, :, 0].mean(1, keepdim=True)
        return weights.expand(seen.positions.shape).masked_fill(seen.positions == seen.length - 1, torch.inf)
