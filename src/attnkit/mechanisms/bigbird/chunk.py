"""Each block of queries gathers the key blocks it sees, eight as a rule, and attends to nothing else.

Sixteen blocks of queries are gathered for at a time, which is all the memory this takes beside its inputs, in the
backward as well, where they are gathered again.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from attnkit.blocks import joined
from attnkit.mechanisms.softmax import softmax_attention

TOGETHER = 16


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    random_blocks: Tensor,
    block: int,
    window: int,
    keep: Tensor,
    scale: float,
) -> Tensor:
    n, blocks = q.shape[2], random_blocks.shape[1]
    if blocks <= 2:
        return _full(q, k, v, keep, scale).masked_fill(~keep[:, None, :, None], 0.0)
    short = blocks * block - n
    q, k, v = (pad(x, (0, 0, 0, short)).unflatten(2, (blocks, block)) for x in (q, k, v))
    real = pad(keep, (0, short))
    edges = torch.cat([q[:, :, 0], q[:, :, -1]], 2)
    first, last = _full(edges, k.flatten(2, 3), v.flatten(2, 3), real, scale).split(block, 2)
    seen, there = _seen(random_blocks, window)
    parts = zip(_split(q[:, :, 1:-1], 2), _split(seen[:, 1:-1], 1), _split(there[:, 1:-1], 1), strict=True)
    inner = joined(_inner, [(part, k, v, *which, real.unflatten(1, (blocks, block)), scale) for part, *which in parts])
    return torch.cat([first, inner.flatten(2, 3), last], 2)[:, :, :n].masked_fill(~keep[:, None, :, None], 0.0)


def _seen(random: Tensor, window: int) -> tuple[Tensor, Tensor]:
    """Key blocks ``(heads, blocks, c)`` that each block of queries sees, and which of these are there at all."""
    heads, blocks, _ = random.shape
    row = torch.arange(blocks, device=random.device)[:, None]
    near = row + torch.arange(-(window // 2), window // 2 + 1, device=random.device)
    # First and last are named as such, so that a window that reaches them does not name them again.
    inside = (near > 0) & (near < blocks - 1)
    edges = torch.tensor([0, 1], device=random.device) * (blocks - 1)
    fixed = torch.cat([edges.expand(blocks, -1), torch.where(inside, near, -1)], 1)
    seen = torch.cat([fixed.expand(heads, -1, -1), random], -1)
    return seen.clamp(min=0), seen >= 0


def _split(x: Tensor, axis: int) -> tuple[Tensor, ...]:
    return (x,) if x.shape[axis] <= TOGETHER else x.split(TOGETHER, axis)


def _inner(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, there: Tensor, real: Tensor, scale: float) -> Tensor:
    """Blocks of queries ``(b, h, s, block, d)`` over those of ``k`` ``(b, g, blocks, block, d)`` that each has seen."""
    (b, h, s, block, _), (g, blocks) = q.shape, k.shape[1:3]
    c = seen.shape[2] * block
    seen, there = (x.expand(h, -1, -1).transpose(0, 1) for x in (seen, there))  # (s, h, c)
    owner = torch.arange(h, device=q.device)[:, None] // (h // g)
    index = (owner * blocks + seen).flatten()
    # A block of queries becomes a sequence of the batch, whose keys are those that it gathered.
    keys, values = (x.flatten(1, 2).index_select(1, index).reshape(b * s, h, c, x.shape[-1]) for x in (k, v))
    sees = real.index_select(1, seen.flatten()) & there.flatten()[:, None]
    o = softmax_attention(
        q.transpose(1, 2).flatten(0, 1), keys, values, bias=_hidden(sees.reshape(b * s, h, 1, c), q), scale=scale
    )
    found: Tensor = o.unflatten(0, (b, s)).transpose(1, 2)
    return found


def _full(q: Tensor, k: Tensor, v: Tensor, real: Tensor, scale: float) -> Tensor:
    o: Tensor = softmax_attention(q, k, v, bias=_hidden(real[:, None, None], q), scale=scale)
    return o


def _hidden(sees: Tensor, q: Tensor) -> Tensor:
    # In the logits and not as a mask: masks are kept for the next call, and each block has its own.
    return q.new_zeros(sees.shape).masked_fill(~sees, -torch.inf)
