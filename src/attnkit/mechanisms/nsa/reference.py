"""NSA as the paper writes it: three attentions of one query, and blocks ranked by what the first of them looked at."""

from __future__ import annotations

import torch
from torch import Tensor

from attnkit.masks import window as last
from attnkit.mechanisms.nsa.blocks import LOCAL, Blocks
from attnkit.mechanisms.softmax import softmax_attention


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    compressed_k: Tensor,
    compressed_v: Tensor,
    window_k: Tensor,
    window_v: Tensor,
    gates: Tensor,
    blocks: Blocks,
    window: int,
    scale: float,
) -> Tensor:
    m, n, c = q.shape[2], k.shape[2], compressed_k.shape[2]
    positions, tokens = torch.arange(n - m, n, device=q.device)[:, None], torch.arange(n, device=q.device)
    ended = torch.arange(c, device=q.device) * blocks.stride + blocks.length - 1 <= positions
    chosen = _chosen(q.detach(), compressed_k.detach(), ended, positions, n, blocks, scale)
    seen = chosen[..., tokens // blocks.block] & (tokens <= positions)
    coarse = softmax_attention(q, compressed_k, compressed_v, mask=ended, scale=scale, backend="reference")
    fine = softmax_attention(q, k, v, mask=seen, scale=scale, backend="reference")
    near = softmax_attention(q, window_k, window_v, mask=last(window), scale=scale, backend="reference")
    gate = gates.to(torch.promote_types(q.dtype, torch.float32))[..., None, :]
    o: Tensor = (gate[..., 0] * coarse + gate[..., 1] * fine + gate[..., 2] * near).to(q.dtype)
    return o


def _chosen(q: Tensor, keys: Tensor, ended: Tensor, positions: Tensor, n: int, blocks: Blocks, scale: float) -> Tensor:
    """Which blocks of tokens each query selects, bool ``(b, h, m, blocks)``, the same for all heads of a group."""
    (b, h, m, d), (g, c) = q.shape, keys.shape[1:3]
    work = torch.promote_types(q.dtype, torch.float32)
    scores = torch.einsum("bgrmd,bgcd->bgrmc", q.to(work).reshape(b, g, h // g, m, d), keys.to(work)) * scale
    shares = scores.masked_fill(~ended, -torch.inf).softmax(-1).masked_fill(~ended, 0.0).sum(2)
    number = torch.arange(-(-n // blocks.block), device=q.device)
    importance = shares.new_zeros(b, g, m, len(number))
    for inside in range(blocks.block // blocks.stride):
        for before in range(blocks.length // blocks.stride):
            at = number * (blocks.block // blocks.stride) + inside - before
            there = (at >= 0) & (at < c)
            importance[..., there] += shares[..., at[there]]
    own = positions // blocks.block
    forced = (number == 0) | (number > own - LOCAL)
    ranked = importance.masked_fill(forced, torch.inf).masked_fill(number > own, -torch.inf)
    rank = ranked.argsort(dim=-1, descending=True, stable=True).argsort(-1)
    return ((rank < blocks.selected) & (number <= own)).repeat_interleave(h // g, 1)
