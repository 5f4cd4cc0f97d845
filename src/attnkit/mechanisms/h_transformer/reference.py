"""H-Transformer-1D token by token: the logit of each pair from the means that its level sees."""

from __future__ import annotations

import torch
from torch import Tensor

from attnkit.masks import causal as causal_mask
from attnkit.mechanisms.h_transformer.blocks import levels
from attnkit.mechanisms.softmax import softmax_attention


def forward(q: Tensor, k: Tensor, v: Tensor, block: int, causal: bool, scale: float, lengths: Tensor | None) -> Tensor:
    work = torch.promote_types(q.dtype, torch.float32)
    (b, h, m), (g, n) = q.shape[:3], k.shape[1:3]
    j = torch.arange(n, device=q.device)
    inside = (j < lengths[:, None] if lengths is not None else j >= 0).expand(b, n)
    keys, values = (x.to(work).masked_fill(~inside[:, None, :, None], 0) for x in (k, v))
    asks = q.to(work)
    i = j[n - m :]
    scores = asks.new_zeros(b, h, m, n)
    for level in reversed(range(levels(n, block))):
        # A query is averaged only where all its tokens are known: in the causal form it would look ahead.
        ask = asks if causal else _means(asks.masked_fill(~inside[:, None, :, None], 0), inside, level)
        key = _means(keys, inside, level).repeat_interleave(h // g, 1)
        at_level = torch.einsum("bhmd,bhnd->bhmn", ask, key) * scale
        together = i[:, None] // (block << level + 1) == j // (block << level + 1)
        scores = torch.where(together, at_level, scores)
    # Softmax attention with known logits: a product of queries and keys that is 0, and the logits as its bias.
    nothing = asks.new_zeros(b, h, m, 1), asks.new_zeros(b, g, n, 1)
    hidden = ~inside[:, None, None]
    o: Tensor = softmax_attention(
        *nothing,
        values,
        mask=causal_mask() if causal else None,
        bias=scores.masked_fill(hidden, -torch.inf),
        scale=1.0,
        backend="reference",
    )
    return o.masked_fill(~inside[:, None, n - m :, None], 0).to(q.dtype)


def _means(x: Tensor, inside: Tensor, level: int) -> Tensor:
    """Each token's ``x`` ``(b, h, n, d)`` replaced by the mean over the true ones of its ``2^level`` tokens."""
    group = torch.arange(x.shape[2], device=x.device) >> level
    groups = -(-x.shape[2] >> level)
    sums = x.new_zeros(*x.shape[:2], groups, x.shape[3]).index_add(2, group, x)
    counts = x.new_zeros(x.shape[0], groups).index_add(1, group, inside.to(x.dtype))
    return (sums / counts.clamp_min(1)[:, None, :, None])[:, :, group]
