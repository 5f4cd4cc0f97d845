"""Blocks of queries over blocks of keys with a running list of the best, then attention to what is left of the keys.

Choosing has no gradient, so nothing of it is kept for the backward: a training step scores all pairs once, and its
backward works on the kept keys alone. Where a block keeps more than one key in 16, fetching its rows one by one costs
more than passing over all of them; it then attends under a bias that hides the others, and chooses again in the
backward rather than keep what it chose.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.checkpoint import checkpoint

from attnkit.blocks import largest
from attnkit.masks import Mask
from attnkit.masks.lowering import grid
from attnkit.mechanisms.softmax import softmax_attention
from attnkit.mechanisms.topk.counts import kept, most

# With 8 heads of 64 numbers, torch finds the best 32 of 8,192 scores in half the time of the best of four times 2,048.
KEYS, TILE = 8192, 512
ELEMENTS = FETCHED = 1 << 24
"""The most scores, and numbers of fetched keys, of a block of queries: 64 MB of float32.

From 32 MB on, glibc gives memory back at once. Training on 8,192 tokens in blocks of 16 MB took 2.2 GiB, of 64 MB 0.7.
"""
SPARSE = 16


class Wanted(NamedTuple):
    """What is kept of which keys: ``longest`` is the most that a query of the call keeps."""

    top: int | None
    density: float | None
    longest: int
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
    if wanted.longest >= n or q.numel() == 0:
        o: Tensor = softmax_attention(q, k, v, mask=mask, scale=scale)
        return o
    rows = max(1, ELEMENTS // (b * h * min(n, KEYS)))
    if m > rows:
        k, v = k.contiguous(), v.contiguous()
    blocks = _blocks(mask, m, n, rows)
    # Counted, not stepped through: Dynamo would fix the number of queries for good.
    parts = [(q[:, :, rows * i : rows * (i + 1)], k, n - m + rows * i, blocks[i], wanted) for i in range(-(-m // rows))]
    if wanted.longest * SPARSE > n:
        return _joined([_traced(_biased, *part, v) for part in parts])
    best, bias = (
        _joined(list(x)) for x in zip(*(_filled(*_best(*part), wanted.longest) for part in parts), strict=True)
    )
    rows = max(1, FETCHED // (b * h * wanted.longest * max(d, e)))
    edges = [slice(rows * i, rows * (i + 1)) for i in range(-(-m // rows))]
    return _joined([_traced(_fetched, q[:, :, at], k, v, best[:, :, at], bias[:, :, at], scale) for at in edges])


def _filled(best: Tensor, bias: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Lists of ``count`` keys also where a block of queries sees fewer."""
    short = count - best.shape[-1]
    return (pad(best, (0, short)), pad(bias, (0, short), value=-torch.inf)) if short else (best, bias)


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2)


def _traced(attend: Callable[..., Tensor], *given: Any) -> Tensor:
    """``attend(*given)``, computed again in the backward."""
    if not torch.is_grad_enabled():
        return attend(*given)
    o: Tensor = checkpoint(attend, *given, use_reentrant=False, preserve_rng_state=False)
    return o


def _blocks(mask: Mask | None, m: int, n: int, rows: int) -> list[list[Keys]]:
    """For each block of queries the blocks of keys that it may see something of; at least one."""
    if mask is None or torch.compiler.is_compiling():  # Dynamo cannot branch on what a tensor says
        all_keys = [Keys(KEYS * i, min(KEYS * (i + 1), n), mask is not None) for i in range(-(-n // KEYS))]
        return [all_keys] * -(-m // rows)
    some, every = (x.flatten(0, 1) for x in mask.tiles(grid(m, n, rows, TILE)))
    return [_neighbours(*row, n) for row in zip(some.any(0).tolist(), (some & every).all(0).tolist(), strict=True)]


def _neighbours(some: list[bool], every: list[bool], n: int) -> list[Keys]:
    """The tiles of a row that show something, neighbours as one block where that stays within ``KEYS``."""
    found: list[Keys] = []
    for i in [i for i, seen in enumerate(some) if seen] or [0]:
        tile = Keys(i * TILE, min((i + 1) * TILE, n), not every[i])
        if found and found[-1].high == tile.low and tile.high - found[-1].low <= KEYS:
            found[-1] = Keys(found[-1].low, tile.high, found[-1].partly or tile.partly)
        else:
            found.append(tile)
    return found


@torch.no_grad()
def _best(q: Tensor, k: Tensor, first: int, blocks: list[Keys], wanted: Wanted) -> tuple[Tensor, Tensor]:
    """The kept keys of each query, int64 ``(b, h, m, c)`` ascending, and 0 or, for places left over, -inf."""
    scores, best, seen = _best_of(q, k, first, blocks[0], wanted)
    for block in blocks[1:]:
        more, keys, visible = _best_of(q, k, first, block, wanted)
        scores, best, seen = torch.cat([scores, more], -1), torch.cat([best, keys], -1), seen + visible
        place = largest(scores, wanted.longest)
        scores, best = scores.gather(-1, place), best.gather(-1, place)
    hidden = scores == -torch.inf
    if wanted.density is not None:
        # The list is as long as the longest row needs; each row now keeps its own share of it.
        order = scores.argsort(dim=-1, descending=True, stable=True)
        hidden = hidden | (order.argsort(-1) >= kept(seen, None, wanted.density)[..., None])
    return best, torch.zeros_like(scores).masked_fill(hidden, -torch.inf)


def _best_of(q: Tensor, k: Tensor, first: int, block: Keys, wanted: Wanted) -> tuple[Tensor, Tensor, Tensor]:
    """The best scores of one block of keys, -inf where nothing may be seen, their keys, and how many a query sees."""
    (b, h, m, d), g = q.shape, k.shape[1]
    work = torch.promote_types(q.dtype, torch.float32)
    keys = k[:, :, block.low : block.high].to(work)
    scores = (q.to(work).reshape(b, g, -1, d) @ keys.mT).view(b, h, m, -1).mul_(wanted.scale)
    visible = torch.full((1, 1, 1), block.high - block.low, device=q.device)
    if block.partly:
        assert wanted.mask is not None
        keep = wanted.mask.part((first, first + m), (block.low, block.high), q.device)
        scores.masked_fill_(~keep, -torch.inf)
        visible = keep.sum(-1)
    place = largest(scores, wanted.longest)
    return scores.gather(-1, place), place + block.low, visible


def _fetched(q: Tensor, k: Tensor, v: Tensor, best: Tensor, bias: Tensor, scale: float) -> Tensor:
    """Every query as a sequence of its own, with the ``c`` keys and values that it keeps."""
    b, h, m, c = best.shape
    shared = best.reshape(b, k.shape[1], -1)
    keys, values = (_rows(x, shared).view(b * h * m, 1, c, -1) for x in (k, v))
    o: Tensor = softmax_attention(
        q.reshape(b * h * m, 1, 1, -1), keys, values, bias=bias.reshape(-1, 1, 1, c), scale=scale
    )
    return o.view(b, h, m, -1)


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """Rows ``index`` (b, g, c) of each head of ``x`` (b, g, n, d)."""
    b, g, n, d = x.shape
    batch, head = torch.arange(b, device=x.device)[:, None, None], torch.arange(g, device=x.device)[:, None]
    if index.shape[2] < n and not x.is_contiguous():  # a state's buffer: for a few rows no copy of all of them
        return x[batch, head, index]
    return x.reshape(b * g * n, d).index_select(0, (index + (batch * g + head) * n).flatten())


def _biased(q: Tensor, k: Tensor, first: int, blocks: list[Keys], wanted: Wanted, v: Tensor) -> Tensor:
    best, bias = _best(q, k, first, blocks, wanted)
    low, high = blocks[0].low, blocks[-1].high
    k, v = k[:, :, low:high], v[:, :, low:high]
    hidden = bias.new_full((*q.shape[:3], k.shape[2]), -torch.inf).scatter_(-1, best - low, bias)
    o: Tensor = softmax_attention(q, k, v, bias=hidden, scale=wanted.scale)
    return o
