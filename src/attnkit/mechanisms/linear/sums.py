"""Values with a column of ones, whose sum is the normaliser of every other."""

from __future__ import annotations

import torch
from torch import Tensor


def with_ones(v: Tensor) -> Tensor:
    """Values (b, g, n, e + 1), float32 at least."""
    v = v.to(torch.promote_types(v.dtype, torch.float32))
    return torch.cat([v, torch.ones_like(v[..., :1])], -1)


def divided(sums: Tensor) -> Tensor:
    """Weighted means (..., e) of sums (..., e + 1); 0 where nothing has weight."""
    whole = sums[..., -1:]
    return sums[..., :-1] / whole.masked_fill(whole == 0, 1.0)
