"""Level by level: each block over its neighbour's summaries, and one running softmax over all levels.

Keys are averaged and values summed. A last column of ones on the values makes the sums count themselves, so that one
product gives the numerator and the denominator of a level. Their logarithms are never taken: next to a logit of 10^4,
float32 has no digits left for the ``ln 2`` between two levels. Levels share the largest logit so far. Nothing here is
larger than ``2 block`` numbers a token and head, one level at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from attnkit.masks import causal as causal_mask
from attnkit.mechanisms.h_transformer.blocks import levels
from attnkit.mechanisms.softmax import softmax_attention

SHORT = 64


def forward(q: Tensor, k: Tensor, v: Tensor, block: int, causal: bool, scale: float, lengths: Tensor | None) -> Tensor:
    m, n, count, out = q.shape[2], k.shape[2], levels(k.shape[2], block), q.dtype
    if count == 1 and lengths is None:
        # All in two blocks. In training by the definition while it costs nothing: dividing two sums, or a fused
        # backward, leaves a gradient of rounding errors where a token sees nothing but itself.
        plain = "reference" if n <= SHORT and torch.is_grad_enabled() else None
        near: Tensor = softmax_attention(q, k, v, mask=causal_mask() if causal else None, scale=scale, backend=plain)
        return near
    work, total = torch.promote_types(out, torch.float32), block << count
    ends = torch.full((len(q),), n, device=q.device) if lengths is None else lengths
    inside = (torch.arange(total, device=q.device) < ends[:, None])[:, None, :, None]  # (b, 1, total, 1)
    ones = inside.expand(-1, k.shape[1], -1, -1).to(work)
    q, k, v = (pad(x.to(work), (0, 0, n - x.shape[2], total - n)) for x in (q, k, v))
    if lengths is not None:
        q, k, v = (x.masked_fill(~inside, 0) for x in (q, k, v))
    v = torch.cat([v, ones], 3)
    top, sums = _weighed(q, k, v, (2 * block, 2 * block), causal, scale)
    for level in range(1, count):
        k, v = _pairs(k), _pairs(v)
        size = v[..., -1:].clamp_min(1)
        if causal:
            # Only the right one of two blocks looks left, from each of its tokens.
            half = block << level
            (left_top, right_top), (left, right) = (x.unflatten(2, (-1, 2, half)).unbind(3) for x in (top, sums))
            asks = q.unflatten(2, (-1, 2, half))[:, :, :, 1].flatten(2, 3)
            keys, values = (x.unflatten(2, (-1, 2, block))[:, :, :, 0].flatten(2, 3) for x in (k / size, v))
            found = _weighed(asks, keys, values, (half, block), False, scale)
            right_top, right = _joined(right_top, right, *(x.unflatten(2, (-1, half)) for x in found))
            top, sums = (torch.stack(x, 3).flatten(2, 4) for x in ((left_top, right_top), (left, right)))
        else:
            q, ones = _pairs(q), _pairs(ones[:, :1])
            keys, values = (x.unflatten(2, (-1, 2, block)).flip(3).flatten(2, 4) for x in (k / size, v))
            found = _weighed(q / ones.clamp_min(1), keys, values, (block, block), False, scale)
            top, sums = _joined(top, sums, *(x.repeat_interleave(1 << level, 2) for x in found))
    o = sums[..., :-1] / torch.where(sums[..., -1:] > 0, sums[..., -1:], 1.0)
    rows: Tensor = o.masked_fill(~inside, 0)[:, :, n - m : n].to(out)
    return rows


def _pairs(x: Tensor) -> Tensor:
    """Sums of every two tokens, ``(b, h, n, d)`` to ``(b, h, n / 2, d)``."""
    summed: Tensor = x.unflatten(2, (-1, 2)).sum(3)
    return summed


def _weighed(
    q: Tensor, k: Tensor, v: Tensor, sizes: tuple[int, int], causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Each block of queries over the block of keys of its number: the largest logits, and ``exp(logits - them) v``."""
    (rows, keys), g = sizes, k.shape[1]
    asks = q.unflatten(1, (g, -1)).unflatten(3, (-1, rows))  # (b, g, r, s, rows, d)
    k, v = (x.unflatten(2, (-1, keys)) for x in (k, v))  # (b, g, s, keys, d)
    logits = torch.einsum("bgrsid,bgsjd->bgrsij", asks, k) * scale
    hidden = (v[..., -1] == 0)[:, :, None, :, None]
    if causal:
        hidden = hidden | torch.ones(rows, keys, dtype=torch.bool, device=q.device).triu(1)
    logits = logits.masked_fill(hidden, -torch.inf)
    # Finite, so that a block with nothing in it has weights exp(-inf) and no NaN.
    top = logits.detach().amax(-1, keepdim=True).clamp_min(torch.finfo(logits.dtype).min)
    sums = torch.einsum("bgrsij,bgsje->bgrsie", torch.exp(logits - top), v)
    return top.flatten(3, 4).flatten(1, 2), sums.flatten(3, 4).flatten(1, 2)


def _joined(top: Tensor, sums: Tensor, other_top: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Two sums of one softmax, brought to the larger of their largest logits."""
    both = torch.maximum(top, other_top)
    return both, sums * torch.exp(top - both) + other * torch.exp(other_top - both)
