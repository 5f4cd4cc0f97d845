"""NSA as the paper writes it: three attentions of one query, and blocks ranked by what the first of them looked at."""

from __future__ import annotations

import torch
from torch import Tensor

from attnkit.masks import symmetric_window
from attnkit.masks import window as windowed
from attnkit.mechanisms.nsa.blocks import Blocks, forced
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
    causal: bool,
    scale: float,
) -> Tensor:
    m, n, c = q.shape[2], k.shape[2], compressed_k.shape[2]
    positions, tokens = torch.arange(n - m, n, device=q.device)[:, None], torch.arange(n, device=q.device)
    there = positions if causal else torch.full_like(positions, n - 1)
    ended = torch.arange(c, device=q.device) * blocks.stride + blocks.length - 1 <= there
    importance = _importance(q.detach(), compressed_k.detach(), ended, n, blocks, scale)
    chosen = _chosen(importance, positions // blocks.block, there // blocks.block, blocks)
    seen = chosen.repeat_interleave(q.shape[1] // k.shape[1], 1)[..., tokens // blocks.block] & (tokens <= there)
    coarse = softmax_attention(q, compressed_k, compressed_v, mask=ended, scale=scale, backend="reference")
    fine = softmax_attention(q, k, v, mask=seen, scale=scale, backend="reference")
    around = windowed(window) if causal else symmetric_window(window - 1)
    near = softmax_attention(q, window_k, window_v, mask=around, scale=scale, backend="reference")
    gate = gates.to(torch.promote_types(q.dtype, torch.float32))[..., None, :]
    o: Tensor = (gate[..., 0] * coarse + gate[..., 1] * fine + gate[..., 2] * near).to(q.dtype)
    return o


def _importance(q: Tensor, keys: Tensor, ended: Tensor, n: int, blocks: Blocks, scale: float) -> Tensor:
    """How important each block of tokens is to a query, ``(b, g, m, blocks)``, to all heads of a group together."""
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
    return importance


def _chosen(importance: Tensor, own: Tensor, last: Tensor, blocks: Blocks) -> Tensor:
    """The best blocks of each query up to its ``last``, bool ``(b, g, m, blocks)``; of equals the earlier ones."""
    number = torch.arange(importance.shape[-1], device=own.device)
    ranked = importance.masked_fill(forced(number, own), torch.inf).masked_fill(number > last, -torch.inf)
    rank = ranked.argsort(dim=-1, descending=True, stable=True).argsort(-1)
    return (rank < blocks.selected) & (number <= last)
