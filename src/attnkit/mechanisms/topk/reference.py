"""Top-k attention as the paper writes it: rank all visible keys of a query and hide those of too low a rank."""

from __future__ import annotations

import torch
from torch import Tensor

from attnkit.masks import Mask, full
from attnkit.mechanisms.softmax import softmax_attention
from attnkit.mechanisms.topk.counts import kept


def forward(
    q: Tensor, k: Tensor, v: Tensor, top: int | None, density: float | None, mask: Mask | None, scale: float
) -> Tensor:
    best = _best(q.detach(), k.detach(), top, density, mask or full(), scale)
    o: Tensor = softmax_attention(q, k, v, mask=best, scale=scale, backend="reference")
    return o


def _best(q: Tensor, k: Tensor, top: int | None, density: float | None, mask: Mask, scale: float) -> Tensor:
    """Which keys each query keeps, bool ``(b, h, m, n)``."""
    (b, h, m, d), (g, n) = q.shape, k.shape[1:3]
    work = torch.promote_types(q.dtype, torch.float32)
    grouped = q.to(work).reshape(b, g, h // g, m, d)
    scores = torch.einsum("bgrmd,bgnd->bgrmn", grouped, k.to(work)).reshape(b, h, m, n) * scale
    visible = mask.dense(m, n, q.device)
    # A stable sort leaves equal scores in the order of their keys.
    order = scores.masked_fill(~visible, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    rank = order.argsort(-1)
    return (rank < kept(visible.sum(-1), top, density)[..., None]) & visible
