"""Tensor product attention as the paper writes it: form queries, keys and values, then softmax attention."""

from __future__ import annotations

import torch
from torch import Tensor

from attnkit.masks import causal as causal_mask
from attnkit.mechanisms.softmax import softmax_attention


def forward(
    a_q: Tensor, b_q: Tensor, a_k: Tensor, b_k: Tensor, a_v: Tensor, b_v: Tensor, causal: bool, scale: float
) -> Tensor:
    work = torch.promote_types(a_q.dtype, torch.float32)
    pairs = ((a_q, b_q), (a_k, b_k), (a_v, b_v))
    q, k, v = (torch.einsum("bhnr,brnd->bhnd", a.to(work), b.to(work)) / b.shape[1] for a, b in pairs)
    mask = causal_mask() if causal else None
    o: Tensor = softmax_attention(q, k, v, mask=mask, scale=scale, backend="reference")
    return o.to(a_q.dtype)
