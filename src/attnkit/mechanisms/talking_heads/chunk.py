"""Blocks of queries over the keys in their reach, all heads of a block together, since each reads all.

Memory is one block's logits, in the backward as well, where each block is computed again.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnkit.blocks import joined, seen, spans
from attnkit.masks import Mask

BLOCK = 64


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mix_logits: Tensor | None,
    mix_weights: Tensor | None,
    mask: Mask | None,
    scale: float,
) -> Tensor:
    m, n = q.shape[2], k.shape[2]

    def rows(start: int, end: int) -> Tensor:
        # In here, so that training does not keep the parts of the mask, which together are m x n as well.
        low, high, keep = seen(mask, start, end, m, n, q.device)
        parts = (q[:, :, start:end], k[:, :, low:high], v[:, :, low:high])
        return _block(*parts, mix_logits, mix_weights, None if keep is None else ~keep, scale)

    o: Tensor = joined(rows, spans(m, BLOCK))
    return o


def _block(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mix_logits: Tensor | None,
    mix_weights: Tensor | None,
    hidden: Tensor | None,
    scale: float,
) -> Tensor:
    (b, h, m, d), (g, n) = q.shape, k.shape[1:3]
    work = torch.promote_types(q.dtype, torch.float32)
    # One mask for all heads need not be applied around the mixtures: what one may not see, none may.
    of_heads = hidden if hidden is not None and hidden.shape[1] > 1 else None
    logits = ((q.to(work) * scale).reshape(b, g, h // g * m, d) @ k.to(work).mT).view(b, h, m, n)
    logits = _mixed(_filled(logits, of_heads, 0.0), mix_logits)
    weights = _filled(_filled(logits, hidden, -torch.inf).softmax(-1), hidden, 0.0)  # a row of -inf gave NaN
    weights = _filled(_mixed(weights, mix_weights), of_heads, 0.0)
    heads, groups = weights.shape[1], v.shape[1]
    o = weights.reshape(b, groups, heads // groups * m, n) @ v.to(work)
    return o.view(b, heads, m, v.shape[3]).to(q.dtype)


def _filled(x: Tensor, hidden: Tensor | None, value: float) -> Tensor:
    return x if hidden is None else x.masked_fill(hidden, value)


def _mixed(x: Tensor, shares: Tensor | None) -> Tensor:
    return x if shares is None else torch.einsum("oh,bhmn->bomn", shares.to(x.dtype), x)
