"""Differential attention as the paper writes it: the difference of two rows of weights, then the values."""

from __future__ import annotations

import torch
from torch import Tensor

from attnkit.masks import Mask
from attnkit.mechanisms.softmax import softmax_attention


def forward(q: Tensor, k: Tensor, v: Tensor, share: Tensor, mask: Mask | None, scale: float) -> Tensor:
    work = torch.promote_types(q.dtype, torch.float32)
    (q1, q2), (k1, k2) = q.to(work).chunk(2, -1), k.to(work).chunk(2, -1)
    # (A1 - share A2) v spelled out as A1 v - share A2 v, so that what a row may not see cannot reach it as 0 x NaN.
    first, second = (
        softmax_attention(qi, ki, v.to(work), mask=mask, scale=scale, backend="reference")
        for qi, ki in ((q1, k1), (q2, k2))
    )
    o: Tensor = first - share.to(work)[:, None, None] * second
    return o.to(q.dtype)
