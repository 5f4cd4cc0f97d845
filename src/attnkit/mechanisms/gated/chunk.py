"""The gate on what softmax attention's own kernels return: native, torch's, and never all weights at once."""

from __future__ import annotations

import torch
from torch import Tensor

from attnkit.masks import Mask
from attnkit.mechanisms.softmax import softmax_attention


def forward(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, mask: Mask | None, scale: float) -> Tensor:
    o: Tensor = softmax_attention(q, k, v, mask=mask, scale=scale)
    work = torch.promote_types(q.dtype, torch.float32)
    return (o.to(work) * torch.sigmoid(gate.to(work))).to(q.dtype)
