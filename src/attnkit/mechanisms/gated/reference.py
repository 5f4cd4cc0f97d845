"""Gated attention as the paper writes it: the result of softmax attention times the sigmoid of the gate."""

from __future__ import annotations

import torch
from torch import Tensor

from attnkit.masks import Mask
from attnkit.mechanisms.softmax import softmax_attention


def forward(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, mask: Mask | None, scale: float) -> Tensor:
    work = torch.promote_types(q.dtype, torch.float32)
    o = softmax_attention(*(x.to(work) for x in (q, k, v)), mask=mask, scale=scale, backend="reference")
    gated: Tensor = o * torch.sigmoid(gate.to(work))
    return gated.to(q.dtype)
