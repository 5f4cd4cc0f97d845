"""What every backend needs: which keys are global tokens, and rows of global tokens put where they stand."""

from __future__ import annotations

import torch
from torch import Tensor


def marks(positions: Tensor, n: int) -> Tensor:
    """Bool ``(b, n)``: the token is one of ``positions`` ``(b, c)``, -1 being none."""
    # One place more than there are tokens takes what stands nowhere.
    found = positions.new_zeros(len(positions), n + 1, dtype=torch.bool)
    return found.scatter(1, _places(positions, n), True)[:, :n]


def placed(local: Tensor, rows: Tensor, positions: Tensor, keep: Tensor) -> Tensor:
    """``local`` ``(b, h, n, e)`` with ``rows`` ``(b, h, c, e)`` at ``positions``, and 0 for padding."""
    n = local.shape[2]
    index = _places(positions, n)[:, None, :, None].expand(rows.shape)
    spread = rows.new_zeros(*local.shape[:2], n + 1, local.shape[3]).scatter(2, index, rows)[:, :, :n]
    found = torch.where(marks(positions, n)[:, None, :, None], spread, local)
    return found.masked_fill(~keep[:, None, :, None], 0.0)


def _places(positions: Tensor, n: int) -> Tensor:
    return torch.where(positions < 0, n, positions)
