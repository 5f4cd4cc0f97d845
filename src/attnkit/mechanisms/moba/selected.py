"""Attention to chosen blocks: pairs of a query and a block, sorted by block, so that many queries share its keys.

A tile is up to 64 rows of one head that chose the same block; its logits are one small matrix product. The parts of a
query, its own block and the chosen ones, are joined as in flash-decoding. How many tiles there can be is known before
anything is chosen, so shapes never depend on data, and a call of one query fetches just the blocks that it chose.
Memory is what one span of queries takes, in the backward as well, where each span is computed again.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from attnkit.blocks import joined, spans
from attnkit.masks import causal
from attnkit.mechanisms.softmax import softmax_attention

ROWS = 64
"""Rows of a tile: each fetched key then serves 64 products."""
LOGITS = 1 << 23
"""The most logits of a span of queries: 32 MB of float32."""


class Tiles(NamedTuple):
    """``pairs`` int64 ``(tiles, size)``: the pair in each slot, some twice; ``groups`` ``(tiles,)``: its block;
    ``slots`` int64, one for each pair: where its result will be."""

    pairs: Tensor
    groups: Tensor
    slots: Tensor


def attend(q: Tensor, k: Tensor, v: Tensor, chosen: Tensor, block: int, scale: float) -> Tensor:
    """Each query's own block up to itself and its ``chosen`` ``(b, c, m, s)`` past blocks: ``(b, h, m, e)``."""
    (b, h, m, _), n, e = q.shape, k.shape[2], v.shape[3]
    if b == 0 or m == 0:
        return q.new_zeros(b, h, m, e)
    if n <= block:
        o: Tensor = softmax_attention(q, k, v, mask=causal(), scale=scale)
        return o
    if m > 1:  # for one query no copy of everything: its few blocks are fetched key by key
        k, v = (pad(x, (0, 0, 0, -n % block)).contiguous() for x in (k, v))
    parts = []
    for start, end in spans(m, max(1, LOGITS // (b * h * block * (1 + chosen.shape[3])))):
        parts.append((q[:, :, start:end], k, v, chosen[:, :, start:end], n - m + start, block, scale))
    o = joined(_rows, parts)
    return o


def _rows(q: Tensor, k: Tensor, v: Tensor, chosen: Tensor, first: int, block: int, scale: float) -> Tensor:
    (b, h, m, d), c = q.shape, chosen.shape[1]
    # One row of pairs for each query of a group of heads that chose together.
    rows = q.reshape(b, c, h // c, m, d).transpose(2, 3).reshape(b * c * m, h // c, d)
    places = torch.arange(first, first + m, device=q.device)
    own = (places // block)[:, None].expand(b, c, m, 1)
    o, top, total = _part(rows, k, v, own, places % block, block, scale)
    if chosen.shape[3]:
        far = _part(rows, k, v, chosen, None, block, scale)
        o, top, total = (torch.cat(pair, 3) for pair in zip((o, top, total), far, strict=True))
    # By the parts' largest logits and not by log-sum-exps, which at logits of 10^5 have two digits left in float32.
    share = torch.exp(top - top.amax(3, keepdim=True))
    o = (o * share[..., None]).sum(3) / (total * share).sum(3)[..., None]
    return o.transpose(2, 3).reshape(b, h, m, -1).to(q.dtype)


def _part(
    rows: Tensor, k: Tensor, v: Tensor, blocks: Tensor, places: Tensor | None, block: int, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Of each query and block values ``(b, c, m, s, r, e)`` weighed by ``exp(logit - top)``; ``top``; sums of weights.

    With ``places``, where in its own block each query stands, keys after it are hidden.
    """
    (b, c, m, s), r = blocks.shape, rows.shape[1]
    count = -(-k.shape[2] // block)
    sequence = torch.arange(b * c, device=blocks.device).view(b, c, 1, 1) * count
    groups = torch.where(blocks < 0, b * c * count, sequence + blocks).flatten()
    tiles = _tiled(groups, b * c * count, max(1, min(m, ROWS // r)))
    number, size = tiles.pairs.shape
    queries = tiles.pairs.flatten() // s
    work = torch.promote_types(rows.dtype, torch.float32)
    asked = rows.index_select(0, queries).to(work).view(number, size * r, -1)
    keys, values = (_fetched(x, tiles.groups, c, block).to(work) for x in (k, v))
    scores = asked @ keys.mT * scale
    if places is not None:
        later = torch.arange(block, device=k.device) > places[queries % m].view(number, size, 1, 1)
        scores = scores.view(number, size, r, block).masked_fill(later, -torch.inf).view(number, size * r, block)
    top = scores.detach().amax(-1, keepdim=True)
    weights = torch.exp(scores - top)
    found = (weights @ values, top, weights.sum(-1, keepdim=True))
    o, top, total = (x.view(number * size, r, -1).index_select(0, tiles.slots).view(b, c, m, s, r, -1) for x in found)
    nothing = (blocks < 0)[..., None, None]
    o, top = o.masked_fill(nothing, 0.0), top.masked_fill(nothing, -torch.inf)
    return o, top.squeeze(-1), total.masked_fill(nothing, 0.0).squeeze(-1)


def _tiled(groups: Tensor, count: int, size: int) -> Tiles:
    """Pairs sorted by group ``(pairs,)``, each group from a tile of its own on; group ``count`` stands for none."""
    number = min(len(groups), len(groups) // size + count)  # tiles that there can be at most
    order = groups.argsort(stable=True)
    ranked = groups[order]
    held = groups.new_zeros(count + 1).scatter_add(0, groups, torch.ones_like(groups))
    past = ((held[:count] + size - 1) // size).cumsum(0)
    start = pad(past, (1, 0)) * size
    place = start[ranked] + torch.arange(len(groups), device=groups.device) - (held.cumsum(0) - held)[ranked]
    nowhere = number * size
    slots = torch.empty_like(groups).scatter(0, order, place.where(ranked < count, nowhere))
    pairs = groups.new_full((nowhere + 1,), -1).scatter(0, slots, torch.arange(len(groups), device=groups.device))
    pairs = pairs[:-1].view(number, size)
    # Slots left over repeat a pair of their tile, and tiles left over the first pair of all: nobody reads them, and
    # they bring no sequence together with the keys of another.
    pairs = pairs.where(pairs >= 0, pairs[:, :1].clamp(min=0))
    of = torch.searchsorted(past, torch.arange(number, device=groups.device), right=True)
    return Tiles(pairs, of.where(of < count, 0), slots.clamp(max=nowhere - 1))


def _fetched(x: Tensor, groups: Tensor, c: int, block: int) -> Tensor:
    """The keys or values ``(tiles, block, d)`` of each tile's block."""
    (b, g, n, d), count = x.shape, -(-x.shape[2] // block)
    batch, head = groups // (c * count), groups // count % c // (c // g)
    if n % block == 0 and x.is_contiguous():
        at = (batch * g + head) * count + groups % count
        return x.view(b * g * count, block, d).index_select(0, at)
    tokens = (groups % count * block)[:, None] + torch.arange(block, device=x.device)
    return x[batch[:, None], head[:, None], tokens.clamp(max=n - 1)]
