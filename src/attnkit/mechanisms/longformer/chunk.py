"""Blocks of queries, each over the keys of its windows with the global keys laid beside them, in one softmax.

A global key within the windows is hidden there, so that it counts once. Memory is one block's logits, in the backward
as well, where each block is computed again.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnkit.blocks import joined
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
    hidden = ~keep | marks(global_positions, n)
    nowhere = (global_positions < 0)[:, None]
    beside = _gathered(k, global_positions), _gathered(v, global_positions)
    # Split once: the gradient of a slice is as long as what it was cut from, and each block would make one.
    queries, keys, values = (_split(x) for x in (q, k, v))
    local, start = [], 0
    for block in queries:
        end = start + block.shape[2]
        low, high = max(0, start - radius), min(n, end + radius)
        far = _far(start, end, low, high, radius, q.device)
        masked = torch.cat([far | hidden[:, None, low:high], nowhere.expand(-1, end - start, -1)], -1)
        near = ([*_between(x, low, high), more] for x, more in zip((keys, values), beside, strict=True))
        local.append((block, *near, masked, scale))
        start = end
    rows = [(block, [global_k], [global_v], ~keep[:, None], scale) for block in _split(global_q)]
    return placed(joined(_block, local), joined(_block, rows), global_positions, keep)


def _split(x: Tensor) -> tuple[Tensor, ...]:
    return (x,) if x.shape[2] <= BLOCK else x.split(BLOCK, 2)


def _between(blocks: tuple[Tensor, ...], low: int, high: int) -> list[Tensor]:
    """Tokens ``low`` to ``high`` of what was split, in pieces."""
    if len(blocks) == 1:
        return [blocks[0][:, :, low:high]]
    first, last = low // BLOCK, (high - 1) // BLOCK
    cut = list(blocks[first : last + 1])
    cut[-1] = cut[-1][:, :, : high - last * BLOCK]
    cut[0] = cut[0][:, :, low - first * BLOCK :]
    return cut


def _far(start: int, end: int, low: int, high: int, radius: int, device: torch.device) -> Tensor:
    queries, keys = (torch.arange(*ends, device=device) for ends in ((start, end), (low, high)))
    return (queries[:, None] - keys).abs() > radius


def _gathered(x: Tensor, positions: Tensor) -> Tensor:
    """``x`` ``(b, g, n, d)`` of the global tokens: ``(b, g, c, d)``; any token's where there is none."""
    index = positions.clamp(min=0)[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])
    return x.gather(2, index)


def _block(q: Tensor, keys: list[Tensor], values: list[Tensor], masked: Tensor, scale: float) -> Tensor:
    """Attention to the keys, which come in pieces, where ``masked`` ``(b, queries | 1, keys)`` is False."""
    # In the logits and not as a mask: masks are kept for the next call, and each block has its own.
    bias = q.new_zeros(masked.shape).masked_fill(masked, -torch.inf)[:, None]
    o: Tensor = softmax_attention(q, torch.cat(keys, 2), torch.cat(values, 2), bias=bias, scale=scale)
    return o
