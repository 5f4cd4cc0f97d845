"""Blocks of queries, each over the keys of its windows with the global keys laid beside them, in one softmax.

A global key within the windows is hidden there, so that it counts once. Memory is one block's logits, in the backward
as well, where each block is computed again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from attnkit.mechanisms.longformer.rows import marks, placed
from attnkit.mechanisms.softmax import softmax_attention

BLOCK = 128
"""Fastest of 64 to 512 for 8,192 tokens, radius 256 and 8 heads of 64 on one core."""


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    global_q: Tensor,
    global_k: Tensor,
    global_v: Tensor,
    global_positions: Tensor,
    radius: int,
    keep: Tensor,
    scale: float,
) -> Tensor:
    n = q.shape[2]
    beside = _gathered(k, global_positions), _gathered(v, global_positions)
    hidden = ~keep | marks(global_positions, n)
    nowhere = (global_positions < 0)[:, None]
    local = []
    for start, end in _blocks(n):
        low, high = max(0, start - radius), min(n, end + radius)
        far = _far(start, end, low, high, radius, q.device)
        masked = torch.cat([far | hidden[:, None, low:high], nowhere.expand(-1, end - start, -1)], -1)
        local.append((q[:, :, start:end], k[:, :, low:high], v[:, :, low:high], *beside, masked, scale))
    rows = [
        (global_q[:, :, start:end], global_k, global_v, None, None, ~keep[:, None], scale)
        for start, end in _blocks(global_q.shape[2])
    ]
    return placed(_joined(local), _joined(rows), global_positions, keep)


def _blocks(n: int) -> list[tuple[int, int]]:
    if n <= BLOCK:
        return [(0, n)]
    return [(start, min(start + BLOCK, n)) for start in range(0, n, BLOCK)]


def _far(start: int, end: int, low: int, high: int, radius: int, device: torch.device) -> Tensor:
    queries, keys = (torch.arange(*ends, device=device) for ends in ((start, end), (low, high)))
    return (queries[:, None] - keys).abs() > radius


def _gathered(x: Tensor, positions: Tensor) -> Tensor:
    """``x`` ``(b, g, n, d)`` of the global tokens: ``(b, g, c, d)``; any token's where there is none."""
    index = positions.clamp(min=0)[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])
    return x.gather(2, index)


def _block(
    q: Tensor, k: Tensor, v: Tensor, more_k: Tensor | None, more_v: Tensor | None, masked: Tensor, scale: float
) -> Tensor:
    """Attention to ``k`` and ``more_k`` where ``masked`` ``(b, queries | 1, keys)`` is False."""
    if more_k is not None and more_v is not None:
        k, v = torch.cat([k, more_k], 2), torch.cat([v, more_v], 2)
    # In the logits and not as a mask: masks are kept for the next call, and each block has its own.
    bias = q.new_zeros(masked.shape).masked_fill(masked, -torch.inf)[:, None]
    o: Tensor = softmax_attention(q, k, v, bias=bias, scale=scale)
    return o


def _joined(parts: list[Any]) -> Tensor:
    if len(parts) == 1 or not torch.is_grad_enabled():
        return torch.cat([_block(*part) for part in parts], 2)
    return torch.cat([checkpoint(_block, *part, use_reentrant=False, preserve_rng_state=False) for part in parts], 2)
