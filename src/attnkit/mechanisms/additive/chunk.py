"""Blocks of queries, so that the hidden layer of all pairs is never in memory at once, nor in the backward.

A block has as many queries as keep ``b * h * rows * n * d`` within ``ELEMENTS``, at least one, whose hidden layer is no
larger than the keys of all heads. An interval mask (causal, a window) also cuts the keys of a block to those in reach.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnkit.blocks import joined, seen, spans
from attnkit.masks import Mask
from attnkit.mechanisms.softmax import softmax_attention

ELEMENTS = 1 << 22
"""16 MB of float32."""


def forward(
    q: Tensor, k: Tensor, v: Tensor, weight: Tensor, gain: Tensor | None, mask: Mask | None, return_lse: bool
) -> Any:
    w = weight.to(torch.promote_types(q.dtype, torch.float32))
    if gain is not None:
        w = gain.to(w.dtype)[:, None] * w / w.norm(dim=-1, keepdim=True)
    (b, h, m, d), n = q.shape, k.shape[2]
    row = b * h * n * d
    if m * row <= ELEMENTS:
        return _attend(q, k, v, _scores(q, k, w), mask, return_lse)

    def rows(start: int, end: int) -> Any:
        # In here, so that training does not keep the parts of the mask, which together are m x n as well.
        low, high, keep = seen(mask, start, end, m, n, q.device)
        return _block(q[:, :, start:end], k[:, :, low:high], v[:, :, low:high], w, keep, return_lse)

    return joined(rows, spans(m, max(1, ELEMENTS // row)))


def _block(q: Tensor, k: Tensor, v: Tensor, w: Tensor, keep: Tensor | None, return_lse: bool) -> Any:
    scores = _scores(q, k, w)
    # In the scores and not as a mask: masks are kept for the next call, and each block has its own.
    return _attend(q, k, v, scores if keep is None else scores.masked_fill(~keep, -torch.inf), None, return_lse)


def _scores(q: Tensor, k: Tensor, w: Tensor) -> Tensor:
    """Scores ``(b, h, m, n)`` in the dtype of ``w``."""
    (b, h, m, d), (g, n) = q.shape, k.shape[1:3]
    pairs = q.to(w.dtype).reshape(b, g, h // g, m, 1, d) + k.to(w.dtype)[:, :, None, None]
    hidden = pairs.tanh() if pairs.requires_grad else pairs.tanh_()
    return (hidden @ w.reshape(g, h // g, 1, d, 1)).reshape(b, h, m, n)


def _attend(q: Tensor, k: Tensor, v: Tensor, scores: Tensor, mask: Mask | None, return_lse: bool) -> Any:
    q, k = torch.zeros_like(q[..., :1]), torch.zeros_like(k[..., :1])
    return softmax_attention(q, k, v, bias=scores, mask=mask, return_lse=return_lse)
