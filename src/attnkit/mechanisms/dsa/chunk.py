"""Blocks of queries that score their keys, choose, and attend to the chosen, in the cheaper of two ways.

``_gathered`` and ``_hidden`` are the two of ``ways``. No block has more than ``NUMBERS`` scores, logits or fetched
numbers, in the backward as well, where each block is computed again.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnkit.blocks import joined, spans
from attnkit.mechanisms.dsa.indexer import choose, masked_scores, reach, unmoved
from attnkit.mechanisms.dsa.ways import after_early, expanded, gathers, part
from attnkit.mechanisms.mla import mla_attention
from attnkit.mechanisms.softmax import softmax_attention

NUMBERS = 1 << 24
"""64 MiB of float32: glibc hands back arrays of over 32 MiB at once, and smaller ones between results leave holes.

With half of it, 8,192 tokens (8 heads, top 512) took 1.9 GiB and 1.7 with training; with this 0.35 and 0.53.
"""


def forward(
    q: Tensor, latent: Tensor, kv_b: Tensor, index_q: Tensor, index_k: Tensor, index_w: Tensor, top: int, scale: float
) -> Tensor:
    way = _gathered if gathers(q, latent, kv_b, top) else _hidden
    index = (index_q.detach(), index_k.detach(), index_w.detach())
    return unmoved(after_early(q, latent, kv_b, index, top, scale, way), index_q, index_k, index_w)


def _gathered(q: Tensor, latent: Tensor, kv_b: Tensor, index: tuple[Tensor, ...], top: int, scale: float) -> Tensor:
    (b, _, m, _), (n, joined_), j = q.shape, latent.shape[2:], index[0].shape[1]
    size = max(1, NUMBERS // max(1, b * max(j * n, top * joined_ * latent.shape[1])))
    blocks = [
        (q[:, :, start:end], latent, kv_b, *part(index, start, end), n - m + start, top, scale)
        for start, end in spans(m, size)
    ]
    o: Tensor = joined(_fetched, blocks)
    return o


def _fetched(
    q: Tensor,
    latent: Tensor,
    kv_b: Tensor,
    index_q: Tensor,
    index_k: Tensor,
    index_w: Tensor,
    first: int,
    top: int,
    scale: float,
) -> Tensor:
    """Every query as a sequence of its own, with the latents that it chose."""
    b, h, m, d = q.shape
    g, joined_ = latent.shape[1], latent.shape[3]
    seen = reach(first + m, latent.shape[2])
    place = listed(choose(masked_scores(index_q, index_k[:, :, :seen], index_w, first), top), top)
    rows = _rows(latent, place).reshape(b * m, top, g, joined_).transpose(1, 2)
    alone = q.transpose(1, 2).reshape(b * m, h, 1, d)
    o = mla_attention(alone, rows, kv_b, scale=scale, backend="absorbed")
    return o.reshape(b, m, h, o.shape[3]).transpose(1, 2)


def _rows(latent: Tensor, place: Tensor) -> Tensor:
    """Latents ``(b, m, top, g, c + r)`` at the places ``(b, m, top)``."""
    (b, g, n, size), batch = latent.shape, torch.arange(latent.shape[0], device=latent.device)[:, None, None]
    by_token = latent.transpose(1, 2)
    if not latent.requires_grad:
        return by_token[batch, place]  # a state's buffer may have gaps, and is not copied for a few rows
    # Its backward adds up row by row, where that of an index sorts and takes several times the memory.
    return (
        by_token.reshape(b * n, g, size).index_select(0, (place + batch * n).flatten()).reshape(*place.shape, g, size)
    )


def listed(chosen: Tensor, top: int) -> Tensor:
    """Places of the ``top`` True of each row, ascending, int64 ``(b, m, top)``."""
    b, m, n = chosen.shape
    slot = torch.where(chosen, chosen.cumsum(-1) - 1, top)  # all others share one slot, which is cut off
    places = torch.arange(n, device=chosen.device).expand(b, m, n)
    return torch.zeros(b, m, top + 1, dtype=torch.int64, device=chosen.device).scatter(-1, slot, places)[..., :top]


def _hidden(q: Tensor, latent: Tensor, kv_b: Tensor, index: tuple[Tensor, ...], top: int, scale: float) -> Tensor:
    (b, h, m, _), n, j = q.shape, latent.shape[2], index[0].shape[1]
    dtype, wide = q.dtype, torch.promote_types(q.dtype, torch.float32)
    k, v = expanded(q, latent, kv_b)
    size = max(1, NUMBERS // max(1, b * max(j, h) * n))
    blocks = [
        (q[:, :, start:end].to(wide), k, v, *part(index, start, end), n - m + start, top, scale)
        for start, end in spans(m, size)
    ]
    o: Tensor = joined(_among_all, blocks)
    return o.to(dtype)


def _among_all(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index_q: Tensor,
    index_k: Tensor,
    index_w: Tensor,
    first: int,
    top: int,
    scale: float,
) -> Tensor:
    seen = reach(first + q.shape[2], k.shape[2])
    chosen = choose(masked_scores(index_q, index_k[:, :, :seen], index_w, first), top)
    # A bias and not a mask: masks are kept lowered, for whom asks again, and this one is never asked for again.
    bias = torch.zeros(chosen.shape, dtype=q.dtype, device=q.device).masked_fill(~chosen, -torch.inf)
    o: Tensor = softmax_attention(q, k[:, :, :seen], v[:, :, :seen], bias=bias[:, None], scale=scale)
    return o
