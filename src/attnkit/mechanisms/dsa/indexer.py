"""The lightning indexer: a cheap score a pair, and the keys it chooses, the first of equals."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

KEYS = 1024
"""Blocks of queries look at this many keys or a multiple: arrays of ever new sizes leave holes that none fits into."""


def reach(end: int, n: int) -> int:
    """Keys out of ``n`` that a block of queries before position ``end`` looks at."""
    return min(n, -(-end // KEYS) * KEYS)


def index_scores(index_q: Tensor, index_k: Tensor, index_w: Tensor) -> Tensor:
    """``sum_j w_j relu(q_j . k)`` of every pair, ``(b, m, n)``, float32 at least."""
    (b, j, m, i), (p, n) = index_q.shape, index_k.shape[1:3]
    wide = torch.promote_types(index_q.dtype, torch.float32)
    grouped = index_q.to(wide).reshape(b, p, j // p * m, i)
    with torch.autocast(index_q.device.type, enabled=False):  # rounded scores would choose at random among near ones
        products = (grouped @ index_k.to(wide).mT).relu_().reshape(b, j, m, n)
        return torch.einsum("bjmn,bjm->bmn", products, index_w.to(wide))


def masked_scores(index_q: Tensor, index_k: Tensor, index_w: Tensor, first: int) -> Tensor:
    """The same for queries from position ``first`` on, -inf for later keys."""
    scores = index_scores(index_q, index_k, index_w)
    m, n = scores.shape[1:]
    positions = torch.arange(first, first + m, device=scores.device)
    return scores.masked_fill(torch.arange(n, device=scores.device) > positions[:, None], -torch.inf)


@torch.no_grad()
def choose(scores: Tensor, top: int) -> Tensor:
    """The ``top`` largest of each row that are not -inf, bool ``(b, m, n)``; of equals those with the lowest index.

    Exact zeros are common: a key that every index head turns away from scores 0, so ties decide who is chosen.
    """
    visible = scores > -torch.inf
    if scores.shape[-1] <= top:
        return visible
    least = scores.topk(top).values[..., -1:]
    above, equal = scores > least, scores == least
    places = top - above.sum(-1, keepdim=True)
    return (above | (equal & (equal.cumsum(-1) <= places))) & visible


class _Unmoved(torch.autograd.Function):
    """A result, and the gradient that a choice has of what it was made by: 0 wherever there is one."""

    @staticmethod
    def forward(ctx: Any, o: Tensor, *chosen_by: Tensor) -> Tensor:
        ctx.save_for_backward(*chosen_by)
        return o.view_as(o)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return (grad, *(torch.zeros_like(x) for x in ctx.saved_tensors))


def unmoved(o: Tensor, *chosen_by: Tensor) -> Tensor:
    """``o`` as a function of what chose its keys: constant between jumps."""
    if not torch.is_grad_enabled() or not any(x.requires_grad for x in chosen_by):
        return o
    same: Tensor = _Unmoved.apply(o, *chosen_by)  # type: ignore[no-untyped-call]
    return same
