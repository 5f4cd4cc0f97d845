"""Two ways to attend to chosen keys, and which one is cheaper.

One gathers the latents that each query chose and attends to them absorbed, which costs ``top`` keys a query however
long the text is. The other hides the rest among keys made once for all queries: for short texts, where most are chosen
anyway.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from attnkit.masks import causal
from attnkit.mechanisms.mla import mla_attention, mla_expand

Index = tuple[Tensor, ...]
"""Index queries, keys and weights."""


def gathers(q: Tensor, latent: Tensor, kv_b: Tensor, top: int) -> bool:
    """Whether attending to fetched latents takes fewer multiply-adds than to all keys, a head."""
    (_, _, m, d), (n, joined_), (_, rows, c) = q.shape, latent.shape[2:], kv_b.shape
    e = rows - (d - (joined_ - c))
    return m * (top * (c + joined_) + rows * c) <= m * n * (d + e) + n * rows * c


def after_early(
    q: Tensor,
    latent: Tensor,
    kv_b: Tensor,
    index: Index,
    top: int,
    scale: float,
    way: Callable[[Tensor, Tensor, Tensor, Index, int, float], Tensor],
) -> Tensor:
    """Latent attention for the queries that see no more than ``top`` keys, and ``way`` for those behind them."""
    m, n = q.shape[2], latent.shape[2]
    early, parts = max(0, min(m, m + top - n)), []
    if early or m == 0:
        parts.append(mla_attention(q[:, :, :early], latent[:, :, : n - m + early], kv_b, mask=causal(), scale=scale))
    if early < m:
        parts.append(way(q[:, :, early:], latent, kv_b, part(index, early, m), top, scale))
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2)


def part(index: Index, start: int, end: int) -> tuple[Tensor, Tensor, Tensor]:
    """The index tensors of some queries."""
    index_q, index_k, index_w = index
    return index_q[:, :, start:end], index_k, index_w[:, :, start:end]


def expanded(q: Tensor, latent: Tensor, kv_b: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values of all heads, in float32 at least."""
    wide = torch.promote_types(q.dtype, torch.float32)
    keys: tuple[Tensor, Tensor] = mla_expand(
        latent.to(wide), kv_b.to(wide), nope=q.shape[3] - (latent.shape[3] - kv_b.shape[2])
    )
    return keys
