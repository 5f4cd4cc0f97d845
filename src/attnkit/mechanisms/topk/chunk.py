"""Blocks of queries over blocks of keys with a running list of the best, then attention to what is left of the keys.

Choosing has no gradient, so nothing of it is kept for the backward: a training step scores all pairs once, and its
backward works on the kept keys alone. Where a block keeps more than one key in 16, fetching its rows one by one costs
more than passing over all of them; it then attends under a bias that hides the others, and chooses again in the
backward rather than keep what it chose.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from attnkit.masks import Mask
from attnkit.masks.lowering import grid
from attnkit.mechanisms.softmax import softmax_attention
from attnkit.mechanisms.topk.counts import kept, most

# With 8 heads of 64 numbers, torch finds the best 32 of 8,192 scores in half the time of the best of four times 2,048.
KEYS = 8192
ELEMENTS = 1 << 22
"""The most scores, or numbers of fetched keys, of a block of queries: 16 MB of float32."""
SPARSE = 16


class Wanted(NamedTuple):
    """What is kept of which keys: ``count`` is the most that a query of the call keeps."""

    top: int | None
    density: float | None
    count: int
    mask: Mask | None
    scale: float


class Keys(NamedTuple):
    """A block of keys; the mask is asked only in one that is ``partly`` visible."""

    low: int
    high: int
    partly: bool


def forward(
    q: Tensor, k: Tensor, v: Tensor, top: int | None, density: float | None, mask: Mask | None, scale: float
) -> Tensor:
    (b, h, m, d), (n, e) = q.shape, v.shape[2:]
    wanted = Wanted(top, density, most(n, top, density), mask, scale)
    if wanted.count >= n or q.numel() == 0:
        o: Tensor = softmax_attention(q, k, v, mask=mask, scale=scale)
        return o
    rows = max(1, ELEMENTS // (b * h * max(min(n, KEYS), wanted.count * max(d, e))))
    blocks = _blocks(mask, m, n, rows)
    if m <= rows:
        return _attend(q, k, v, n - m, blocks[0], wanted)
    k, v = k.contiguous(), v.contiguous()
    starts = range(0, m, rows)
    parts = [_attend(q[:, :, i : i + rows], k, v, n - m + i, blocks[i // rows], wanted) for i in starts]
    return torch.cat(parts, 2)


def _blocks(mask: Mask | None, m: int, n: int, rows: int) -> list[list[Keys]]:
    """For each block of queries the blocks of keys that it may see something of; at least one."""
    # Counted, not stepped through: Dynamo would fix the number of keys for good.
    edges = [(KEYS * i, min(KEYS * (i + 1), n)) for i in range(-(-n // KEYS))]
    if mask is None or torch.compiler.is_compiling():  # Dynamo cannot branch on what a tensor says
        return [[Keys(*edge, mask is not None) for edge in edges]] * -(-m // rows)
    some, every = (x.flatten(0, 1) for x in mask.tiles(grid(m, n, rows, KEYS)))
    return [
        [Keys(*edge, not full) for edge, seen, full in zip(edges, *row, strict=True) if seen] or [Keys(*edges[0], True)]
        for row in zip(some.any(0).tolist(), (some & every).all(0).tolist(), strict=True)
    ]


def _attend(q: Tensor, k: Tensor, v: Tensor, first: int, blocks: list[Keys], wanted: Wanted) -> Tensor:
    """Attention ``(b, h, m, e)`` of a block of queries, the first of them at position ``first``."""
    if wanted.count * SPARSE <= blocks[-1].high - blocks[0].low:
        best, bias = _best(q, k, first, blocks, wanted)
        attend, given = _fetched, (q, k, v, best, bias, wanted.scale)
    else:
        attend, given = _biased, (q, k, v, first, blocks, wanted)
    if torch.is_grad_enabled():
        o: Tensor = checkpoint(attend, *given, use_reentrant=False, preserve_rng_state=False)
        return o
    return attend(*given)


@torch.no_grad()
def _best(q: Tensor, k: Tensor, first: int, blocks: list[Keys], wanted: Wanted) -> tuple[Tensor, Tensor]:
    """The kept keys of each query, int64 ``(b, h, m, c)`` ascending, and 0 or, for places left over, -inf."""
    scores, seen = q.new_empty(*q.shape[:3], 0, dtype=torch.promote_types(q.dtype, torch.float32)), 0
    best = torch.empty(scores.shape, dtype=torch.int64, device=q.device)
    for block in blocks:
        new, visible = _scores(q, k, first, block, wanted)
        keys = torch.arange(block.low, block.high, device=q.device).expand(new.shape)
        scores, best, seen = torch.cat([scores, new], -1), torch.cat([best, keys], -1), seen + visible
        place = _largest(scores, wanted.count)
        scores, best = scores.gather(-1, place), best.gather(-1, place)
    hidden = scores == -torch.inf
    if wanted.density is not None:
        # The list is as long as the longest row needs; each row now keeps its own share of it.
        order = scores.argsort(dim=-1, descending=True, stable=True)
        hidden = hidden | (order.argsort(-1) >= kept(seen, None, wanted.density)[..., None])
    return best, torch.zeros_like(scores).masked_fill(hidden, -torch.inf)


def _scores(q: Tensor, k: Tensor, first: int, block: Keys, wanted: Wanted) -> tuple[Tensor, Tensor]:
    """Scores ``(b, h, m, keys)``, -inf where nothing may be seen, and how many keys each query sees."""
    (b, h, m, d), g = q.shape, k.shape[1]
    work = torch.promote_types(q.dtype, torch.float32)
    keys = k[:, :, block.low : block.high].to(work)
    scores = (q.to(work).reshape(b, g, -1, d) @ keys.mT).view(b, h, m, -1).mul_(wanted.scale)
    if not block.partly:
        return scores, torch.full((1, 1, 1), block.high - block.low, device=q.device)
    assert wanted.mask is not None
    visible = wanted.mask.part((first, first + m), (block.low, block.high), q.device)
    return scores.masked_fill_(~visible, -torch.inf), visible.sum(-1)


def _largest(scores: Tensor, count: int) -> Tensor:
    """Places of the ``count`` largest of each row, ascending; of equals the first ones."""
    if scores.shape[-1] <= count:
        return torch.arange(scores.shape[-1], device=scores.device).expand(scores.shape)
    values, place = scores.topk(count + 1)
    # torch.topk takes any of several equals, which matters when some of them are in and some are not.
    tied = (values[..., -1] == values[..., -2]) & (values[..., -2] > -torch.inf)
    if torch.compiler.is_compiling() or bool(tied.any()):
        place = scores.argsort(dim=-1, descending=True, stable=True)
    return place[..., :count].sort(-1).values


def _fetched(q: Tensor, k: Tensor, v: Tensor, best: Tensor, bias: Tensor, scale: float) -> Tensor:
    """Every query as a sequence of its own, with the ``c`` keys and values that it keeps."""
    b, h, m, c = best.shape
    shared = best.view(b, k.shape[1], -1)
    keys, values = (_rows(x, shared).view(b * h * m, 1, c, -1) for x in (k, v))
    o: Tensor = softmax_attention(
        q.reshape(b * h * m, 1, 1, -1), keys, values, bias=bias.view(-1, 1, 1, c), scale=scale
    )
    return o.view(b, h, m, -1)


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """Rows ``index`` (b, g, c) of each head of ``x`` (b, g, n, d)."""
    b, g, n, d = x.shape
    batch, head = torch.arange(b, device=x.device)[:, None, None], torch.arange(g, device=x.device)[:, None]
    if not x.is_contiguous():  # a state's buffer: a step would copy all of it for the few rows that it needs
        return x[batch, head, index]
    return x.view(-1, d).index_select(0, (index + (batch * g + head) * n).flatten())


def _biased(q: Tensor, k: Tensor, v: Tensor, first: int, blocks: list[Keys], wanted: Wanted) -> Tensor:
    best, bias = _best(q, k, first, blocks, wanted)
    low, high = blocks[0].low, blocks[-1].high
    k, v = k[:, :, low:high], v[:, :, low:high]
    hidden = bias.new_full((*q.shape[:3], k.shape[2]), -torch.inf).scatter_(-1, best - low, bias)
    o: Tensor = softmax_attention(q, k, v, bias=hidden, scale=wanted.scale)
    return o
