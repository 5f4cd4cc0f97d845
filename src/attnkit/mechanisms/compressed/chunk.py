"""Blocks of queries, each over the tokens of its window and the entries closed by its end: no table of all pairs.

Where a query may see few of many entries, they are fetched for it one by one, and it attends as a sequence of its own;
else it passes over all entries of its block, those not chosen hidden. Training computes each block again.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnkit.blocks import joined, spans
from attnkit.masks import window as near
from attnkit.mechanisms.softmax import softmax_attention

BLOCK = 128
SPARSE = 16
"""Entries for each chosen one from which on fetching the chosen ones costs less than passing over all: measured on one
core of an AMD EPYC with 8 heads of 64 numbers. A few queries cannot share the pass, and fetch from ``2 m`` on."""
FETCHED = 1 << 24
"""The most numbers that a block of queries fetches: 64 MB of float32."""


def forward(
    q: Tensor,
    kv: Tensor,
    entries: Tensor | None,
    chosen: Tensor | None,
    window: int,
    rate: int | None,
    sink: Tensor | None,
    scale: float,
    length: int,
) -> Tensor:
    (b, g, n, d), m = kv.shape, q.shape[2]
    first, rows = length - m, BLOCK
    fetched = False
    if entries is not None and chosen is not None:
        fetched = chosen.shape[2] * min(SPARSE, 2 * m) <= entries.shape[2]
    if fetched:
        assert chosen is not None
        rows = min(BLOCK, max(1, FETCHED // max(1, b * g * (window + chosen.shape[2]) * d)))
    blocks = []
    for start, end in spans(m, rows):
        part = (q[:, :, start:end], kv[:, :, max(0, n - m + start - window + 1) : n - m + end])
        far: tuple[Tensor | None, Tensor | None] = (None, None)
        if entries is not None and rate is not None:
            # Fetching takes few of the entries, so that there is no reason to cut off those that nobody sees.
            closed = entries if fetched else entries[:, :, : (first + end) // rate]
            far = (closed, None if chosen is None else chosen[:, start:end])
        blocks.append((*part, *far, first + start, window, rate, sink, scale))
    o: Tensor = joined(_fetched if fetched else _block, blocks)
    return o


def _block(
    q: Tensor,
    kv: Tensor,
    entries: Tensor | None,
    chosen: Tensor | None,
    first: int,
    window: int,
    rate: int | None,
    sink: Tensor | None,
    scale: float,
) -> Tensor:
    if entries is None or rate is None:
        o: Tensor = softmax_attention(q, kv, kv, mask=near(window), scale=scale, sink=sink)
        return o
    (b, _, m, _), n, count = q.shape, kv.shape[2], entries.shape[2]
    work = torch.promote_types(q.dtype, torch.float32)
    closed = (torch.arange(first, first + m, device=q.device) + 1) // rate
    hidden = (torch.arange(count, device=q.device) >= closed[:, None])[None]
    if chosen is not None:
        place = chosen.masked_fill((chosen < 0) | (chosen >= count), count)  # a column more, for what is none
        skipped = torch.ones(b, m, count + 1, dtype=torch.bool, device=q.device).scatter_(-1, place, False)
        hidden = hidden | skipped[..., :count]
    outside = ~near(window).part((n - m, n), (0, n), q.device)[0]
    both = torch.cat([outside.expand(len(hidden), m, n), hidden], -1)[:, None]
    keys = torch.cat([kv, entries], 2)
    bias = torch.zeros(both.shape, dtype=work, device=q.device).masked_fill_(both, -torch.inf)
    o = softmax_attention(q, keys, keys, bias=bias, scale=scale, sink=sink)
    return o


def _fetched(
    q: Tensor,
    kv: Tensor,
    entries: Tensor,
    chosen: Tensor,
    first: int,
    window: int,
    rate: int,
    sink: Tensor | None,
    scale: float,
) -> Tensor:
    """Every query as a sequence of its own, with the tokens of its window and the entries that it chose.

    The query heads of a KV head become its queries, and the sink one more key: torch's kernel would write keys out for
    each head in training, which takes 20 times as long with 8 heads of 64 numbers.
    """
    (b, h, m, d), (g, n), r = q.shape, kv.shape[1:3], q.shape[1] // kv.shape[1]
    rows = torch.arange(m, device=q.device)[:, None]
    token = rows + (n - m + 1 - window) + torch.arange(window, device=q.device)
    closed = (first + rows + 1) // rate
    hidden = torch.cat([(token < 0).expand(b, -1, -1), (chosen < 0) | (chosen >= closed)], -1)
    batch, head = torch.arange(b, device=q.device)[:, None, None, None], torch.arange(g, device=q.device)[:, None, None]
    seen = [kv[:, :, token.clamp(min=0)], entries[batch, head, chosen[:, None].clamp(min=0)]]
    work = torch.promote_types(q.dtype, torch.float32)
    bias = torch.zeros(hidden.shape, dtype=work, device=q.device).masked_fill_(hidden, -torch.inf)
    bias = bias.view(b * m, 1, 1, hidden.shape[2])
    if sink is not None:
        seen.append(kv.new_zeros(b, g, m, 1, d))
        column = sink.to(work).view(g, r, 1).expand(b * m, g, r, 1)
        bias = torch.cat([bias.expand(b * m, g, r, hidden.shape[2]), column], -1)
    keys = torch.cat([x.transpose(1, 2) for x in seen], 3).view(b * m, g, bias.shape[3], d)
    alone = q.reshape(b, g, r, m, d).permute(0, 3, 1, 2, 4).reshape(b * m, g, r, d)
    o: Tensor = softmax_attention(alone, keys, keys, bias=bias, scale=scale)
    return o.view(b, m, h, d).transpose(1, 2)
