"""Factors multiplied out as one small matrix product a token, then softmax attention; and the step from factors."""

from __future__ import annotations

import torch
from torch import Tensor

from attnkit.masks import causal as causal_mask
from attnkit.mechanisms.softmax import softmax_attention


def forward(
    a_q: Tensor, b_q: Tensor, a_k: Tensor, b_k: Tensor, a_v: Tensor, b_v: Tensor, causal: bool, scale: float
) -> Tensor:
    q, k, v = (_product(a, b) for a, b in ((a_q, b_q), (a_k, b_k), (a_v, b_v)))
    o: Tensor = softmax_attention(q, k, v, mask=causal_mask() if causal else None, scale=scale)
    return o.to(a_q.dtype)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """``(b, h, n, d)`` of factors (b, h, n, R) and (b, R, n, d), in float32 at least: it is an intermediate result."""
    work = torch.promote_types(a.dtype, torch.float32)
    whole: Tensor = (a.to(work).permute(0, 2, 1, 3) @ b.to(work).transpose(1, 2) / b.shape[1]).transpose(1, 2)
    return whole


def step(a_q: Tensor, b_q: Tensor, a_k: Tensor, b_k: Tensor, a_v: Tensor, b_v: Tensor, scale: float) -> Tensor:
    """Products with the shared vectors first, then each head's mixture of them: ``R (h + d)`` numbers read a token."""
    work = torch.promote_types(a_q.dtype, torch.float32)
    m, n = b_q.shape[2], b_k.shape[2]
    q = _product(a_q, b_q)
    reach = torch.einsum("bhmd,brnd->bhrmn", q, b_k.to(work))
    logits = torch.einsum("bhrmn,bhnr->bhmn", reach, a_k.to(work)) * (scale / b_k.shape[1])
    hidden = ~causal_mask().dense(m, n, q.device)
    weights = logits.masked_fill(hidden, -torch.inf).softmax(-1)
    shared = torch.einsum("bhmn,bhnr->bhrmn", weights, a_v.to(work))
    o = torch.einsum("bhrmn,brne->bhme", shared, b_v.to(work)) / b_v.shape[1]
    return o.to(a_q.dtype)
