"""What trains the indexer, which no gradient of the attention reaches: be distributed as the attention is."""

from __future__ import annotations

import torch
from torch import Tensor

from attnkit.blocks import joined, spans
from attnkit.mechanisms.dsa.indexer import choose, masked_scores, reach
from attnkit.mechanisms.mla import mla_expand

NUMBERS = 1 << 23
"""Logits that one block of queries may have, 32 MiB of them."""


def index_loss(
    q: Tensor,
    latent: Tensor,
    kv_b: Tensor,
    index_q: Tensor,
    index_k: Tensor,
    index_w: Tensor,
    top: int | None,
    scale: float,
) -> Tensor:
    """Mean over queries of ``KL(p || softmax(index scores))``, over all earlier keys or the ``top`` chosen."""
    (b, h, m, d), (n, size), j = q.shape, latent.shape[2:], index_q.shape[1]
    wide = torch.promote_types(q.dtype, torch.float32)
    with torch.no_grad():
        k, _ = mla_expand(latent.to(wide), kv_b.to(wide), nope=d - (size - kv_b.shape[2]))
        q = q.to(wide) * scale
    rows = max(1, NUMBERS // max(1, b * max(j, h) * n))
    blocks = [
        (q[:, :, start:end], k, index_q[:, :, start:end], index_k, index_w[:, :, start:end], n - m + start, top)
        for start, end in spans(m, rows)
    ]
    divergences: Tensor = joined(_divergences, blocks)
    return divergences.mean()


def _divergences(
    q: Tensor, k: Tensor, index_q: Tensor, index_k: Tensor, index_w: Tensor, first: int, top: int | None
) -> Tensor:
    """``(b, 1, m)``, of queries from position ``first`` on."""
    seen = reach(first + q.shape[2], k.shape[2])
    scores = masked_scores(index_q, index_k[:, :, :seen], index_w, first)
    with torch.no_grad():
        kept = choose(scores, seen if top is None else top)
        weights = (q @ k[:, :, :seen].mT).masked_fill(~kept[:, None], -torch.inf).softmax(-1)
        target = weights.mean(1)
    log = scores.masked_fill(~kept, -torch.inf).log_softmax(-1).masked_fill(~kept, 0.0)
    return (torch.xlogy(target, target) - target * log).sum(-1)[:, None]


class _Aside(torch.autograd.Function):
    """A result beside which a loss is trained: it is the first argument, and the loss has gradient 1."""

    @staticmethod
    def forward(ctx: object, o: Tensor, loss: Tensor) -> Tensor:
        return o.view_as(o)

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, grad.new_ones(())


def beside(o: Tensor, loss: Tensor) -> Tensor:
    """``o``, whose backward also runs that of ``loss``."""
    same: Tensor = _Aside.apply(o, loss)  # type: ignore[no-untyped-call]
    return same
