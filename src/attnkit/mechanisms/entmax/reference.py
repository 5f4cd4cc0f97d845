"""Entmax attention as the papers write it: sort the scores, find how many stay, subtract the threshold."""

from __future__ import annotations

import torch
from torch import Tensor

from attnkit.masks import Mask, full


def forward(q: Tensor, k: Tensor, v: Tensor, alpha: float, mask: Mask | None, scale: float) -> Tensor:
    (b, h, m, d), (g, n, e) = q.shape, v.shape[1:]
    if n == 0:
        return q.new_zeros(b, h, m, e)
    work = torch.promote_types(q.dtype, torch.float32)
    grouped = q.to(work).reshape(b, g, h // g, m, d)
    scores = torch.einsum("bgrmd,bgnd->bgrmn", grouped, k.to(work)).reshape(b, h, m, n) * scale
    visible = (mask or full()).dense(m, n, q.device)
    weights = (sparsemax if alpha == 2 else entmax15)(scores, visible).reshape(b, g, h // g, m, n)
    # A weight of 0 keeps out NaN and infinity as well, which a product with 0 would not.
    spoiled = ~v.isfinite()
    values = v.to(work).masked_fill(spoiled, 0.0)
    o = torch.einsum("bgrmn,bgne->bgrme", weights, values)
    reached = torch.einsum("bgrmn,bgne->bgrme", (weights > 0).to(work), spoiled.to(work)) > 0
    o = o.masked_fill(reached, torch.nan)
    return o.reshape(b, h, m, e).to(q.dtype)


def sparsemax(z: Tensor, visible: Tensor) -> Tensor:
    """The point of the simplex nearest to each row's visible scores: ``max(z - tau, 0)``."""
    z, kept = _lowered(z, visible, 2.0)
    best = z.sort(dim=-1, descending=True).values
    count = torch.arange(1, z.shape[-1] + 1, device=z.device)
    total = best.cumsum(-1)
    stay = (1 + count * best > total).sum(-1, keepdim=True).clamp(min=1)
    tau = (total.gather(-1, stay - 1) - 1) / stay
    return (z - tau).clamp(min=0) * kept


def entmax15(z: Tensor, visible: Tensor) -> Tensor:
    """``max(z / 2 - tau, 0)^2`` with the threshold that makes each row add up to 1."""
    z, kept = _lowered(z / 2, visible, 2.0)
    best = z.sort(dim=-1, descending=True).values
    count = torch.arange(1, z.shape[-1] + 1, device=z.device)
    mean = best.cumsum(-1) / count
    spread = best.square().cumsum(-1) - count * mean.square()
    taus = mean - ((1 - spread) / count).clamp(min=torch.finfo(z.dtype).tiny).sqrt()
    stay = (taus <= best).sum(-1, keepdim=True).clamp(min=1)
    return (z - taus.gather(-1, stay - 1)).clamp(min=0).square() * kept


def _lowered(z: Tensor, visible: Tensor, depth: float) -> tuple[Tensor, Tensor]:
    """Scores less their row's best, none below ``-depth``, and what of them can have weight.

    No score that is 1 below the best has any weight, so how far below it is does not matter; -inf would.
    """
    hidden = z.masked_fill(~visible, -torch.inf)
    best = hidden.detach().amax(-1, keepdim=True)
    low = torch.where(best == -torch.inf, 0.0, best)
    return (hidden - low).clamp(min=-depth), visible & (best > -torch.inf)
