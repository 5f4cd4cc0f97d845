"""Spans of queries over the compressed blocks and their window, which also choose; then the chosen blocks alone.

A span has one table of its queries times the compressed blocks, and the keys of its windows. Training computes each
span again in the backward. The chosen blocks are MoBA's ``selected_attention``, with one list for a group of heads.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from attnkit import masks
from attnkit.blocks import joined, spans
from attnkit.mechanisms.moba import selected_attention
from attnkit.mechanisms.nsa.blocks import Blocks, forced
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
    causal: bool,
    scale: float,
) -> Tensor:
    m, n, held = q.shape[2], k.shape[2], window_k.shape[2]
    parts = []
    for start, end in spans(m, SPAN):
        there, before = blocks.compressed(n - m + end if causal else n), held - m
        low, high = max(0, before + start + 1 - window), before + end
        keys = (x[:, :, :there] for x in (compressed_k, compressed_v))
        near = (x[:, :, low : high if causal else high + window - 1] for x in (window_k, window_v))
        outer, place = gates[:, :, start:end], (n - m + start, before + start - low)
        parts.append((q[:, :, start:end], outer, *keys, *near, *place, n, blocks, window, causal, scale))
    o, chosen = joined(_rows, parts)
    if blocks.selected >= -(-n // blocks.block):
        fine = softmax_attention(q, k, v, mask=masks.causal() if causal else None, scale=scale)
    else:
        fine = selected_attention(q, k, v, chosen, block=blocks.block, causal=causal, scale=scale)
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
    place: int,
    n: int,
    blocks: Blocks,
    window: int,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The first and the third branch ``(b, h, m, e)`` together, and the blocks chosen for the second.

    The first query stands at position ``first``, and at ``place`` among the keys of its window.
    """
    work = torch.promote_types(q.dtype, torch.float32)
    q, gates, compressed_k, compressed_v, window_k, window_v = (
        x.to(work) for x in (q, gates, compressed_k, compressed_v, window_k, window_v)
    )
    (b, h, m, d), (g, c) = q.shape, compressed_k.shape[1:3]
    positions = torch.arange(first, first + m, device=q.device)[:, None]
    there = positions if causal else torch.full_like(positions, n - 1)
    ended = torch.arange(c, device=q.device) * blocks.stride + blocks.length - 1 <= there
    some = there >= blocks.length - 1
    scores = torch.einsum("bgrmd,bgcd->bgrmc", q.reshape(b, g, h // g, m, d), compressed_k) * scale
    # A row without a block is left whole before the softmax and emptied after it: -inf alone would make it NaN.
    weights = scores.masked_fill(~ended & some, -torch.inf).softmax(-1).masked_fill(~some, 0.0)
    coarse = torch.einsum("bgrmc,bgce->bgrme", weights, compressed_v).reshape(b, h, m, -1)
    if causal:
        near = softmax_attention(q, window_k, window_v, mask=masks.window(window), scale=scale)
    else:  # in the logits: to a mask, queries would be the last of these keys
        gap = torch.arange(m, device=q.device)[:, None] + place - torch.arange(window_k.shape[2], device=q.device)
        far = q.new_zeros(gap.shape).masked_fill(gap.abs() >= window, -torch.inf)
        near = softmax_attention(q, window_k, window_v, bias=far[None, None], scale=scale)
    return gates[..., 0, None] * coarse + gates[..., 2, None] * near, _chosen(weights, positions, there, n, blocks)


@torch.no_grad()
def _chosen(weights: Tensor, positions: Tensor, there: Tensor, n: int, blocks: Blocks) -> Tensor:
    """Blocks beside the own one, int64 ``(b, g, m, s)``, -1 in places left over."""
    importance = _importance(weights.detach().sum(2), -(-n // blocks.block), blocks)
    own, number = positions // blocks.block, torch.arange(importance.shape[-1], device=positions.device)
    other = (number <= there // blocks.block) & (number != own)
    ranked = importance.masked_fill(forced(number, own), torch.inf).masked_fill(~other, -torch.inf)
    best = ranked.sort(dim=-1, descending=True, stable=True)
    chosen, rank = (x[..., : blocks.selected - 1] for x in (best.indices, best.values))
    return chosen.masked_fill(rank == -torch.inf, -1)


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
