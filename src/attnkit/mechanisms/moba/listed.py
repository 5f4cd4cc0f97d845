"""Gradients of attention to chosen blocks, by the backward of softmax attention over rows in the order of blocks.

Every query is written down once for its own block and once for each block it chose, sorted by block and filled up to
whole tiles, so that a list of blocks says what the rows of a tile see. A row brings the log-sum-exp and the result of
its whole query, and so its gradients are the parts of the query's. Nothing is added in an order that could change:
keys and values get theirs in the order of rows, a query the sum of its parts in the order of its list.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from attnkit import masks, native
from attnkit.blocks import spans
from attnkit.masks import UNBOUNDED, BlockList
from attnkit.native.softmax import packed, packed_gradients

NUMBERS = 1 << 27
"""The most numbers of queries that are written down at once: 256 MB of bfloat16."""

_ROWS, _KEYS = native.BLOCK_QUERIES, native.BLOCK_KEYS


class Rows(NamedTuple):
    """``source`` ``(b, c, rows)``: the query of each row, ``m`` where there is none, as in the last row.

    ``places`` ``(b, c, m, 1 + s)``: the rows of a query, the last one for a place left over in its list.
    """

    source: Tensor
    places: Tensor
    blocks: BlockList


def gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    rest: Tensor,
    d_o: Tensor,
    chosen: Tensor,
    block: int,
    scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v in their dtypes; ``lse`` and ``rest`` ``(b, h, m)`` are from the forward."""
    (b, h, m, d), n, wide = q.shape, k.shape[2], torch.promote_types(q.dtype, torch.float32)
    if o.numel() == 0:
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    parts = spans(m, max(_ROWS, NUMBERS // (b * h * d * (1 + chosen.shape[3]))))
    d_q, sums = [], None
    for start, end in parts:
        q_, o_, lse_, rest_, d_o_ = (x[:, :, start:end] for x in (q, o, lse, rest, d_o))
        # Later keys are seen by nobody: queries are the last of those that are left.
        keys = n - m + end if causal else n
        rows = written(chosen[:, :, start:end], keys, n - m + start, h, block, causal)
        found = _of_rows(q_, k[:, :, :keys], v[:, :, :keys], o_, lse_, rest_, d_o_, rows, scale)
        d_q.append(_collected(found[0], rows.places, wide).to(q.dtype))
        if len(parts) == 1:
            return d_q[0], found[1], found[2]
        if sums is None:
            sums = [torch.zeros(x.shape, dtype=wide) for x in (k, v)]
        for total, more in zip(sums, found[1:], strict=True):
            total[:, :, :keys] += more
    assert sums is not None
    return torch.cat(d_q, 2), sums[0].to(k.dtype), sums[1].to(v.dtype)


def written(chosen: Tensor, n: int, first: int, heads: int, block: int, causal: bool) -> Rows:
    """Rows for lists ``(b, c, m, s)`` of the queries from position ``first`` on, and what they see of ``n`` keys."""
    b, c, m, s = chosen.shape
    own, tiles = _own(m, n, first, block, causal), -(-m // _ROWS)
    lists, count, others = b * c, -(-n // block), m * s
    groups = chosen.reshape(lists, others).long()
    groups = torch.where((groups < 0) | (groups >= count), count, groups)
    order = groups.argsort(stable=True)
    ranked = groups.gather(1, order)
    held = torch.zeros(lists, count + 1, dtype=torch.int64).scatter_add_(1, groups, torch.ones_like(groups))
    past = ((held[:, :count] + _ROWS - 1) // _ROWS).cumsum(1)
    more = int(past[:, -1].max())
    # Rows: those of own blocks, those of chosen ones, and a tile that sees nothing.
    start, total = tiles * _ROWS, (tiles + more + 1) * _ROWS
    begin = pad(past, (1, 0)) * _ROWS - pad(held.cumsum(1), (1, 0))[:, : count + 1]
    place = start + begin.gather(1, ranked) + torch.arange(others)
    place = torch.where(ranked < count, place, total - 1)
    source = torch.full((lists, total), m).scatter_(1, place, order // max(s, 1))
    source[:, :m], source[:, -1] = torch.arange(m), m
    places = torch.empty_like(order).scatter_(1, order, place).view(lists, m, s)
    mine = torch.arange(m)[None, :, None].expand(lists, m, 1)
    columns, pattern, patterns = _columns(count, n, block, len(own.patterns))
    of = torch.searchsorted(past, torch.arange(more).expand(lists, more).contiguous(), right=True)
    listed = [_entries(own, columns, pattern, x) for x in of]
    again = heads // c
    found = BlockList(
        offsets=pad(torch.cat([x[0] for x in listed for _ in range(again)]).cumsum(0), (1, 0)),
        columns=torch.cat([x[1] for x in listed for _ in range(again)]),
        pattern=torch.cat([x[2] for x in listed for _ in range(again)]),
        patterns=torch.cat([own.patterns, patterns]),
        batches=b,
        heads=heads,
        block_q=_ROWS,
        block_k=_KEYS,
    )
    return Rows(source.view(b, c, total), torch.cat([mine, places], 2).view(b, c, m, 1 + s), found)


def _own(m: int, n: int, first: int, block: int, causal: bool) -> BlockList:
    """Queries against their own blocks."""
    own = masks.chunked(block)
    if causal or first + m == n:
        return ((own & masks.causal()) if causal else own).block_list(m, n, _ROWS, _KEYS)
    return masks.explicit(own.part((first, first + m), (0, n))).block_list(m, n, _ROWS, _KEYS)


def _columns(count: int, n: int, block: int, known: int) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """For each block the key blocks it lies in and their patterns, which all rows of a tile have alike."""
    columns, pattern = [], []
    patterns: list[int] = []
    for begin in range(0, count * block, block):
        end = min(n, begin + block)
        found, words = range(begin // _KEYS, -(-end // _KEYS)), []
        for column in found:
            low, high = max(0, begin - column * _KEYS), min(_KEYS, end - column * _KEYS)
            words.append(-1 if high - low == _KEYS else known + len(patterns))
            if high - low < _KEYS:
                word = (1 << high) - (1 << low)
                patterns.append(word - (1 << 64) if word >> 63 else word)
        columns.append(torch.tensor(found, dtype=torch.int32))
        pattern.append(torch.tensor(words, dtype=torch.int32))
    nothing = torch.zeros(0, dtype=torch.int32)
    each = torch.tensor(patterns, dtype=torch.int64)[:, None].expand(-1, _ROWS)
    return [*columns, nothing], [*pattern, nothing], each


def _entries(own: BlockList, columns: list[Tensor], pattern: list[Tensor], of: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of one list: how many entries each tile has, and the entries; ``of`` is the block of each chosen tile."""
    tiles = of.tolist()
    counts = torch.tensor([*(len(columns[i]) for i in tiles), 0], dtype=torch.int64)
    return (
        torch.cat([own.offsets.diff(), counts]),
        torch.cat([own.columns, *(columns[i] for i in tiles)]),
        torch.cat([own.pattern, *(pattern[i] for i in tiles)]),
    )


def _of_rows(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    rest: Tensor,
    d_o: Tensor,
    rows: Rows,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    q, o, d_o = (_taken(x, rows.source) for x in (q, o, d_o))
    # A row that is none has seen nothing, and gives nothing.
    lse, rest = (_taken(x[..., None], rows.source, by).squeeze(3) for x, by in ((lse, -torch.inf), (rest, 0.0)))
    call = packed(
        q, k, v, o, lse, rest, rows.blocks, UNBOUNDED, UNBOUNDED, scale, None, None, None, None, native.PREFILL
    )  # fmt: skip
    d_q, d_k, d_v = (x.new_empty(x.shape) for x in (q, k, v))
    native.run("softmax_backward", call, packed_gradients(d_o, None, d_q, d_k, d_v))
    return d_q, d_k, d_v


def _taken(x: Tensor, source: Tensor, none: float = 0.0) -> Tensor:
    """Rows ``source`` ``(b, c, rows)`` of ``x`` ``(b, h, m, d)``, ``none`` where there are none."""
    (b, h, m, d), (_, c, rows) = x.shape, source.shape
    index = source.repeat_interleave(h // c, 1) + (torch.arange(b * h) * (m + 1)).view(b, h, 1)
    return pad(x, (0, 0, 0, 1), value=none).view(-1, d).index_select(0, index.flatten()).view(b, h, rows, d)


def _collected(parts: Tensor, places: Tensor, wide: torch.dtype) -> Tensor:
    """The sum of each query's rows."""
    (b, h, rows, d), (_, c, m, s) = parts.shape, places.shape
    index = places.repeat_interleave(h // c, 1) + (torch.arange(b * h) * rows).view(b, h, 1, 1)
    flat = parts.view(-1, d)
    total = flat.index_select(0, index[..., 0].flatten()).to(wide)
    for i in range(1, s):
        total += flat.index_select(0, index[..., i].flatten())
    return total.view(b, h, m, d)
