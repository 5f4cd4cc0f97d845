"""Additive attention as the paper writes it: every pair's hidden layer at once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnkit.masks import Mask
from attnkit.mechanisms.softmax import softmax_attention


def forward(
    q: Tensor, k: Tensor, v: Tensor, weight: Tensor, gain: Tensor | None, mask: Mask | None, return_lse: bool
) -> Any:
    work = torch.promote_types(q.dtype, torch.float32)
    w = weight.to(work)
    if gain is not None:
        w = gain.to(work)[:, None] * w / w.norm(dim=-1, keepdim=True)
    keys = k.to(work).repeat_interleave(q.shape[1] // k.shape[1], 1)
    hidden = torch.tanh(q.to(work)[:, :, :, None] + keys[:, :, None])
    scores = torch.einsum("bhmnd,hd->bhmn", hidden, w)
    # What is left is a softmax over given scores: attention whose queries and keys say nothing beyond the bias.
    q, k = torch.zeros_like(q[..., :1]), torch.zeros_like(k[..., :1])
    return softmax_attention(q, k, v, bias=scores, mask=mask, return_lse=return_lse, backend="reference")
