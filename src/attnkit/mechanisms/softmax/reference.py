"""Softmax attention as the papers write it: the definition every other backend is measured against.

Order of the logits (mechanisms differ here, and order matters): ``q k^T * scale``, soft-cap, additive bias and ALiBi,
mask, sink column, softmax, drop the sink column, dropout, values.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnkit.masks import Mask
from attnkit.noise import DROP_BITS, bits, drop_below
from attnkit.positions import distance


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask | None,
    scale: float,
    bias: Tensor | None,
    alibi: Tensor | None,
    softcap: float | None,
    sink: Tensor | None,
    dropout: float,
    seed: int | Tensor | None,
    return_lse: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    (b, h, m, d), (g, n, e) = q.shape, v.shape[1:]
    work = torch.promote_types(q.dtype, torch.float32)
    # Head h reads KV head h // r: consecutive query heads share one.
    grouped = q.reshape(b, g, h // g, m, d).to(work)
    scores = torch.einsum("bgrmd,bgnd->bgrmn", grouped, k.to(work)).reshape(b, h, m, n) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias.to(work)
    if alibi is not None:
        scores = scores - alibi.to(work)[:, None, None] * distance(m, n, q.device)
    keep = mask.dense(m, n, q.device) if mask is not None else None
    if keep is not None:
        scores = scores.masked_fill(~keep, -torch.inf)
    weights, lse = _softmax(scores, sink.to(work)[:, None] if sink is not None else None)
    if dropout:
        assert seed is not None
        weights = weights * dropout_keep(seed, b, h, m, n, dropout, q.device) / (1 - dropout)
    o = _values(weights.reshape(b, g, h // g, m, n), keep, v.to(work)).reshape(b, h, m, e).to(q.dtype)
    return (o, lse) if return_lse else o


def _softmax(scores: Tensor, sink: Tensor | None) -> tuple[Tensor, Tensor]:
    """Weights ``(b, h, m, n)`` and log-sum-exp ``(b, h, m)``; a row that sees nothing has weights 0 and -inf."""
    if scores.shape[-1] == 0:
        lse = scores.new_full(scores.shape[:-1], -torch.inf)
        return scores, lse if sink is None else lse.logaddexp(sink.expand_as(lse))
    top = scores.detach().amax(-1)
    if sink is not None:
        top = top.maximum(sink.detach())
    top = torch.where(top == -torch.inf, 0.0, top)
    weights = torch.exp(scores - top[..., None])
    total = weights.sum(-1)
    if sink is not None:
        total = total + torch.exp(sink - top)
    empty = total == 0
    total = torch.where(empty, 1.0, total)
    return weights / total[..., None], torch.where(empty, -torch.inf, top + torch.log(total))


def _values(weights: Tensor, keep: Tensor | None, v: Tensor) -> Tensor:
    """``weights @ v`` in which a key that a row may not see never reaches it, not even as 0 x NaN."""
    finite = torch.isfinite(v)
    if keep is None or (not torch.compiler.is_compiling() and bool(finite.all())):
        return torch.einsum("bgrmn,bgne->bgrme", weights, v)
    b, g, r, m, n = weights.shape
    seen = keep.expand(b, g * r, m, n).reshape(weights.shape).to(v.dtype)

    def meets(which: Tensor) -> Tensor:
        return torch.einsum("bgrmn,bgne->bgrme", seen, which.to(v.dtype)) > 0

    above, below = meets(v == torch.inf), meets(v == -torch.inf)
    o = torch.einsum("bgrmn,bgne->bgrme", weights, torch.where(finite, v, 0.0))
    o = torch.where(above, torch.inf, torch.where(below, -torch.inf, o))
    return torch.where(meets(v.isnan()) | (above & below), torch.nan, o)


def dropout_keep(seed: int | Tensor, b: int, h: int, m: int, n: int, dropout: float, device: torch.device) -> Tensor:
    """Which weights survive, bool ``(b, h, m, n)``, by where their pair stands."""
    queries, keys = torch.arange(n - m, n, device=device), torch.arange(n, device=device)
    return bits(seed, b, h, queries, keys, DROP_BITS) >= drop_below(dropout)
