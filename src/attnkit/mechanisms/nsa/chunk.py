"""Spans of queries over the compressed blocks and their window, which also choose; then the chosen blocks alone.

A span has one table of its queries times the compressed blocks, and the keys of its windows. Training computes each
span again in the backward. The chosen blocks are MoBA's ``selected_attention``, with one list for a group of heads.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from attnkit.blocks import joined, spans
from attnkit.masks import causal
from attnkit.masks import window as last
from attnkit.mechanisms.moba import selected_attention
from attnkit.mechanisms.nsa.blocks import FORCED, Blocks
from attnkit.mechanisms.softmax import softmax_attention

SPAN = 256


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
    m, n, held = q.shape[2], k.shape[2], window_k.shape[2]
    parts = []
    for start, end in spans(m, SPAN):
        there, before = blocks.compressed(n - m + end), held - m
        keys = (x[:, :, :there] for x in (compressed_k, compressed_v))
        near = (x[:, :, max(0, before + start + 1 - window) : before + end] for x in (window_k, window_v))
        outer = gates[:, :, start:end]
        parts.append((q[:, :, start:end], outer, *keys, *near, n - m + start, n, blocks, window, scale))
    o, chosen = joined(_rows, parts)
    if blocks.selected >= -(-n // blocks.block):
        fine = softmax_attention(q, k, v, mask=causal(), scale=scale)
    else:
        fine = selected_attention(q, k, v, chosen, block=blocks.block, scale=scale)
    found: Tensor = (o + gates[..., 1, None].to(o.dtype) * fine).to(q.dtype)
    return found


def _rows(
    q: Tensor,
    gates: Tensor,
    compressed_k: Tensor,
    compressed_v: Tensor,
    window_k: Tensor,
    window_v: Tensor,
    first: int,
    n: int,
    blocks: Blocks,
    window: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The first and the third branch ``(b, h, m, e)`` together, and the blocks chosen for the second."""
    work = torch.promote_types(q.dtype, torch.float32)
    q, gates, compressed_k, compressed_v, window_k, window_v = (
        x.to(work) for x in (q, gates, compressed_k, compressed_v, window_k, window_v)
    )
    (b, h, m, d), (g, c) = q.shape, compressed_k.shape[1:3]
    positions = torch.arange(first, first + m, device=q.device)[:, None]
    ended = torch.arange(c, device=q.device) * blocks.stride + blocks.length - 1 <= positions
    some = positions >= blocks.length - 1
    scores = torch.einsum("bgrmd,bgcd->bgrmc", q.reshape(b, g, h // g, m, d), compressed_k) * scale
    # A row without a block is left whole before the softmax and emptied after it: -inf alone would make it NaN.
    weights = scores.masked_fill(~ended & some, -torch.inf).softmax(-1).masked_fill(~some, 0.0)
    coarse = torch.einsum("bgrmc,bgce->bgrme", weights, compressed_v).reshape(b, h, m, -1)
    near = softmax_attention(q, window_k, window_v, mask=last(window), scale=scale)
    return gates[..., 0, None] * coarse + gates[..., 2, None] * near, _chosen(weights, positions, n, blocks)


@torch.no_grad()
def _chosen(weights: Tensor, positions: Tensor, n: int, blocks: Blocks) -> Tensor:
    """Blocks beside the own one, int64 ``(b, g, m, s)``, -1 in places left over."""
    importance = _importance(weights.detach().sum(2), -(-n // blocks.block), blocks)
    own, number = positions // blocks.block, torch.arange(importance.shape[-1], device=positions.device)
    free = (number > 0) & (number < own - 1)
    ranked = importance.masked_fill(~free, -torch.inf).sort(dim=-1, descending=True, stable=True)
    best, rank = (x[..., : blocks.selected - FORCED] for x in (ranked.indices, ranked.values))
    forced = torch.cat([torch.where(own > 0, 0, -1), torch.where(own > 1, own - 1, -1)], -1)
    return torch.cat([forced.expand(*best.shape[:3], 2), best.masked_fill(rank == -torch.inf, -1)], -1)


def _importance(shares: Tensor, count: int, blocks: Blocks) -> Tensor:
    """For each of ``count`` selection blocks the ``shares`` ``(..., c)`` of the compressed blocks that overlap it.

    Each counts as often as the two have strides in common.
    """
    inside, before = blocks.block // blocks.stride, blocks.length // blocks.stride
    width = inside + before - 1
    times = shares.new_tensor([min(i + 1, inside, before, width - i) for i in range(width)])
    around = pad(shares, (before - 1, inside * count - shares.shape[-1])).unfold(-1, width, inside)
    # A sum of a few in one order, and no product of matrices: equal blocks are to be equal to the last bit.
    return (around * times).sum(-1)
