"""Talking-heads attention as the paper writes it: all logits, mixed, all weights, mixed, then the values."""

from __future__ import annotations

import torch
from torch import Tensor

from attnkit.masks import Mask, full


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mix_logits: Tensor | None,
    mix_weights: Tensor | None,
    mask: Mask | None,
    scale: float,
) -> Tensor:
    (b, h, m, d), (g, n) = q.shape, k.shape[1:3]
    work = torch.promote_types(q.dtype, torch.float32)
    hidden = ~(mask or full()).dense(m, n, q.device)
    grouped = q.to(work).reshape(b, g, h // g, m, d)
    logits = torch.einsum("bgrmd,bgnd->bgrmn", grouped, k.to(work)).reshape(b, h, m, n) * scale
    # What a head may not see has no say in another's logits, and is hidden again whenever another head has spoken.
    logits = _mixed(logits.masked_fill(hidden, 0.0), mix_logits)
    weights = logits.masked_fill(hidden, -torch.inf).softmax(-1).masked_fill(hidden, 0.0)
    weights = _mixed(weights, mix_weights).masked_fill(hidden, 0.0)
    return _values(weights, ~hidden, v.to(work)).to(q.dtype)


def _mixed(x: Tensor, shares: Tensor | None) -> Tensor:
    return x if shares is None else torch.einsum("oh,bhmn->bomn", shares.to(x.dtype), x)


def _values(weights: Tensor, keep: Tensor, v: Tensor) -> Tensor:
    """``weights @ v``, NaN where a row sees a value that is not finite and nowhere else, not even as 0 x NaN."""
    (b, heads, m, n), groups = weights.shape, v.shape[1]
    by_group = (b, groups, heads // groups, m, n)
    finite = torch.isfinite(v)
    o = torch.einsum("bgrmn,bgne->bgrme", weights.reshape(by_group), torch.where(finite, v, 0.0))
    seen = keep.expand(b, heads, m, n).reshape(by_group).to(v.dtype)
    spoiled = torch.einsum("bgrmn,bgne->bgrme", seen, (~finite).to(v.dtype)) > 0
    return torch.where(spoiled, torch.nan, o).reshape(b, heads, m, v.shape[3])
