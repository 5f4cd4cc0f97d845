"""Attention to chosen blocks: pairs of a query and a block, sorted by block, so that many queries share its keys.

A tile is up to 128 rows of one head that chose the same block; its logits are one small matrix product. The parts of a
query, its own block and the chosen ones, are joined as in flash-decoding. A call of one query fetches just the blocks
that it chose. Queries are taken in spans and tiles in pieces that stay in a processor's cache, and the backward, which
is written out, works through the same tiles again and keeps no weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

from attnkit import masks
from attnkit.blocks import spans
from attnkit.mechanisms.softmax import softmax_attention

ROWS = 128
"""Rows of a tile: each fetched key then serves so many products."""
SPAN, PIECE = 1 << 23, 1 << 18
"""The most numbers in the results of a span's pairs, and logits of a piece: 32 and 1 MB of float32."""


class Chosen(NamedTuple):
    """A span's lists of blocks ``(b, c, m, s)``. With ``places`` ``(m,)`` they are the queries' own blocks, and keys
    after these places are hidden; with ``end`` there are no keys from there on, and the last block is filled up."""

    blocks: Tensor
    places: Tensor | None
    end: int | None


class Tiles(NamedTuple):
    """``pairs`` int64 ``(tiles, size)``: the pair in each slot, which is ``real`` or repeats another of its tile.

    ``groups`` ``(tiles,)``: the sequence, list and block of a tile. ``slots``, one for each pair: where it is.
    """

    pairs: Tensor
    real: Tensor
    groups: Tensor
    slots: Tensor


class Piece(NamedTuple):
    """Some tiles: the rows that ask, by number and themselves, the keys, and logits, -inf for hidden ones."""

    queries: Tensor
    asked: Tensor
    keys: Tensor
    logits: Tensor
    groups: Tensor
    real: Tensor


def attend(q: Tensor, k: Tensor, v: Tensor, chosen: Tensor, block: int, scale: float, causal: bool = True) -> Tensor:
    """Each query's own block, up to itself when ``causal``, and its ``chosen`` ``(b, c, m, s)``: ``(b, h, m, e)``."""
    (b, h, m, _), n, e = q.shape, k.shape[2], v.shape[3]
    if b == 0 or m == 0:
        return q.new_zeros(b, h, m, e) + (q.sum() + k.sum() + v.sum())  # no numbers, but gradients of 0
    if n <= block:
        o: Tensor = softmax_attention(q, k, v, mask=masks.causal() if causal else None, scale=scale)
        return o
    first, learns = n - m, torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    if m > 1 or learns:  # for one query no copy of everything: its few blocks are fetched key by key
        k, v = (pad(x, (0, 0, 0, -n % block)).contiguous() for x in (k, v))
    with torch.autocast(q.device.type, enabled=False):  # the backward, which it does not reach, mixes no types either
        o = _Attend.apply(q, k, v, chosen, first, None if causal else n, block, scale)  # type: ignore[no-untyped-call]
    return o


class _Attend(torch.autograd.Function):
    """Rows of a span are ``(b * c * m, r, d)``: the ``r = h / c`` heads of a query that read one list."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        chosen: Tensor,
        first: int,
        end: int | None,
        block: int,
        scale: float,
    ) -> Tensor:
        c, results, tops, totals = chosen.shape[1], [], [], []
        for start, past, parts in _spanned(chosen, first, end, block, q.shape[1] * v.shape[3]):
            rows = _rows(q[:, :, start:past], c)
            found = [_part(rows, k, v, part, block, scale) for part in parts]
            o, top, total = (torch.cat(x, 3) for x in zip(*found, strict=True))
            # Joined by the largest logits: log-sum-exps have two digits left in float32 where logits are 10^5.
            most = top.amax(3, keepdim=True)
            share = torch.exp(top - most)
            total = (total * share).sum(3)
            results.append(_heads((o * share).sum(3) / total))
            tops.append(_heads(most.squeeze(3)))
            totals.append(_heads(total))
        o, top, total = (torch.cat(x, 2) for x in (results, tops, totals))
        ctx.save_for_backward(q, k, v, chosen, o, top, total)
        ctx.settings = first, end, block, scale
        return o.to(q.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, chosen, o, top, total = ctx.saved_tensors
        (first, end, block, scale), c, work = ctx.settings, chosen.shape[1], o.dtype
        slope = slope.to(work)
        # What a row's logits all have in common, see FlashAttention's backward.
        common = (slope * o).sum(-1, keepdim=True)
        dk, dv = (torch.zeros(x.shape, dtype=work, device=x.device) for x in (k, v))
        dq = []
        for start, past, parts in _spanned(chosen, first, end, block, q.shape[1] * v.shape[3]):
            rows, *rest = (_rows(x[:, :, start:past], c) for x in (q, slope, common, top, total))
            found = torch.zeros(rows.shape, dtype=work, device=rows.device)
            for part in parts:
                _add_gradients(rows, k, v, part, block, scale, rest, (found, dk, dv))
            dq.append(_heads(found.view(q.shape[0], c, past - start, *found.shape[1:])))
        return torch.cat(dq, 2).to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None, None, None, None


def _spanned(
    chosen: Tensor, first: int, end: int | None, block: int, width: int
) -> Iterator[tuple[int, int, list[Chosen]]]:
    """Start and end of each span of queries, with their own blocks and the chosen ones; a result is ``width`` wide.

    Of ``end`` keys a query sees later ones as well; without it, none.
    """
    b, c, m, s = chosen.shape
    for start, past in spans(m, max(1, SPAN // (b * width * (1 + s)))):
        positions = torch.arange(first + start, first + past, device=chosen.device)
        own = (positions // block)[:, None].expand(b, c, -1, 1)
        parts = [Chosen(own, positions % block if end is None else None, end)]
        yield start, past, [*parts, Chosen(chosen[:, :, start:past], None, end)] if s else parts


def _rows(x: Tensor, c: int) -> Tensor:
    """``(b, h, m, d)`` as rows ``(b * c * m, h / c, d)``."""
    b, h, m, d = x.shape
    return x.reshape(b, c, h // c, m, d).transpose(2, 3).reshape(b * c * m, h // c, d)


def _heads(x: Tensor) -> Tensor:
    """``(b, c, m, r, d)`` as ``(b, h, m, d)``."""
    b, c, m, r, d = x.shape
    return x.transpose(2, 3).reshape(b, c * r, m, d)


def _part(
    rows: Tensor, k: Tensor, v: Tensor, chosen: Chosen, block: int, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Of each query and block values weighed by ``exp(logit - top)``, ``top``, and the sum of these weights.

    All are ``(b, c, m, s, r, size)``, with the size of values and 1.
    """
    tiles, c, found = _tiled(chosen, rows.shape[1], k.shape[2], block), chosen.blocks.shape[1], []
    for piece in _pieces(rows, k, tiles, chosen, block, scale):
        top = piece.logits.amax(-1, keepdim=True)
        weights = piece.logits.sub_(top).exp_()
        values = _fetched(v, piece.groups, c, block).to(weights.dtype)
        found.append((weights @ values, top, weights.sum(-1, keepdim=True)))
    shape = *chosen.blocks.shape, rows.shape[1], -1
    o, top, total = (
        torch.cat(x).view(tiles.pairs.numel(), rows.shape[1], -1).index_select(0, tiles.slots).view(shape)
        for x in zip(*found, strict=True)
    )
    nothing = (chosen.blocks < 0)[..., None, None]
    return o.masked_fill_(nothing, 0.0), top.masked_fill_(nothing, -torch.inf), total.masked_fill_(nothing, 0.0)


def _add_gradients(
    rows: Tensor,
    k: Tensor,
    v: Tensor,
    chosen: Chosen,
    block: int,
    scale: float,
    rest: list[Tensor],
    into: tuple[Tensor, Tensor, Tensor],
) -> None:
    """Add what these pairs give to the gradients of the span's rows, of keys and of values."""
    (found, dk, dv), c, r = into, chosen.blocks.shape[1], rows.shape[1]
    dk, dv = (x.view(-1, block, x.shape[3]) for x in (dk, dv))
    tiles = _tiled(chosen, r, k.shape[2], block)
    for piece in _pieces(rows, k, tiles, chosen, block, scale):
        number = len(piece.groups)
        slope, common, top, total = (x.index_select(0, piece.queries).view(number, -1, x.shape[2]) for x in rest)
        real = piece.real[:, :, None].expand(-1, -1, r).reshape(number, -1, 1)
        weights = piece.logits.sub_(top).exp_().div_(total).masked_fill_(~real, 0.0)
        values = _fetched(v, piece.groups, c, block).to(weights.dtype)
        logits = (slope @ values.mT).sub_(common).mul_(weights)
        found.index_add_(0, piece.queries, (logits @ piece.keys).mul_(scale).view(-1, *found.shape[1:]))
        at = _place(piece.groups, c, k.shape[1], k.shape[2] // block)
        dk.index_add_(0, at, (logits.mT @ piece.asked).mul_(scale))
        dv.index_add_(0, at, weights.mT @ slope)


def _pieces(rows: Tensor, k: Tensor, tiles: Tiles, chosen: Chosen, block: int, scale: float) -> Iterator[Piece]:
    (_, c, m, s), r = chosen.blocks.shape, rows.shape[1]
    number, size = tiles.pairs.shape
    work = torch.promote_types(rows.dtype, torch.float32)
    for start, end in spans(number, max(1, PIECE // (size * r * block))):
        queries, groups = tiles.pairs[start:end].flatten() // s, tiles.groups[start:end]
        asked = rows.index_select(0, queries).to(work).view(end - start, size * r, -1)
        keys = _fetched(k, groups, c, block).to(work)
        logits = (asked @ keys.mT).mul_(scale)  # after the product: equal keys then have equal logits in every tile
        if chosen.places is not None:
            later = torch.arange(block, device=k.device) > chosen.places[queries % m].view(-1, size, 1, 1)
            logits.view(-1, size, r, block).masked_fill_(later, -torch.inf)
        elif chosen.end is not None and chosen.end % block:
            tokens = (groups % -(-k.shape[2] // block) * block)[:, None, None] + torch.arange(block, device=k.device)
            logits.masked_fill_(tokens >= chosen.end, -torch.inf)
        yield Piece(queries, asked, keys, logits, groups, tiles.real[start:end])


def _tiled(chosen: Chosen, r: int, n: int, block: int) -> Tiles:
    """Pairs sorted by the sequence, list and block that they want, each of these from a tile of its own on."""
    blocks = chosen.blocks
    (b, c, m, s), count = blocks.shape, -(-n // block)
    sequence, wanted = torch.arange(b * c, device=blocks.device).view(b, c, 1, 1) * count, b * c * count
    # No larger than twice what a block gets on average: the last tile of each is only partly filled.
    size = max(1, min(m, ROWS // r, block if chosen.places is not None else 2 * b * c * m * s // wanted))
    groups = torch.where(blocks < 0, wanted, sequence + blocks).flatten()  # the last stands for no block
    order = groups.argsort(stable=True)
    ranked, numbers = groups[order], torch.arange(len(groups), device=blocks.device)
    held = groups.new_zeros(wanted + 1).scatter_add(0, groups, torch.ones_like(groups))
    past = ((held[:wanted] + size - 1) // size).cumsum(0)
    # There cannot be more, whatever is chosen: no shape of a graph depends on data, and no accelerator has to wait.
    number = min(len(groups), len(groups) // size + wanted)
    if blocks.device.type == "cpu" and not torch.compiler.is_compiling():
        number = max(1, int(past[-1]))
    place = pad(past, (1, 0))[ranked] * size + numbers - (held.cumsum(0) - held)[ranked]
    nowhere = number * size
    slots = torch.empty_like(groups).scatter(0, order, place.where(ranked < wanted, nowhere))
    pairs = groups.new_full((nowhere + 1,), -1).scatter(0, slots, numbers)[:-1].view(number, size)
    real = pairs >= 0
    # Slots left over repeat a pair of their tile, and tiles left over the first pair of all: nobody reads them, and
    # they bring no sequence together with the keys of another.
    of = torch.searchsorted(past, torch.arange(number, device=blocks.device), right=True)
    return Tiles(
        pairs.where(real, pairs[:, :1].clamp(min=0)), real, of.where(of < wanted, 0), slots.clamp(max=nowhere - 1)
    )


def _place(groups: Tensor, c: int, g: int, count: int) -> Tensor:
    """Which of all blocks ``(b * g * count)`` of keys a tile's is; ``c / g`` lists read one KV head."""
    return groups // (c * count) * (g * count) + groups // count % c // (c // g) * count + groups % count


def _fetched(x: Tensor, groups: Tensor, c: int, block: int) -> Tensor:
    """The keys or values ``(tiles, block, d)`` of each tile's block."""
    (_, g, n, d), count = x.shape, -(-x.shape[2] // block)
    place = _place(groups, c, g, count)
    if n % block == 0 and x.is_contiguous():
        return x.view(-1, block, d).index_select(0, place)
    tokens = (groups % count * block)[:, None] + torch.arange(block, device=x.device)
    head = (place // count)[:, None]
    return x[head // g, head % g, tokens.clamp(max=n - 1)]
