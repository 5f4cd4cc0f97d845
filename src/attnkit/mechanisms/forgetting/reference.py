"""Forgetting attention as the paper writes it: softmax attention with the bias ``c_i - c_j`` spelled out."""

from __future__ import annotations

import torch
from torch import Tensor

from attnkit.masks import causal
from attnkit.mechanisms.softmax import softmax_attention


def forward(q: Tensor, k: Tensor, v: Tensor, log_f: Tensor, scale: float) -> Tensor:
    total = log_f.to(torch.promote_types(q.dtype, torch.float32)).cumsum(-1)
    bias = total[:, :, k.shape[2] - q.shape[2] :, None] - total[:, :, None]
    o: Tensor = softmax_attention(q, k, v, mask=causal(), scale=scale, bias=bias, backend="reference")
    return o
