"""Compressed attention as the report writes it: one softmax over near tokens, entries and the sink, all spelled out."""

from __future__ import annotations

import torch
from torch import Tensor

from attnkit.masks import window as near
from attnkit.mechanisms.softmax import softmax_attention


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
    b, m, n = q.shape[0], q.shape[2], kv.shape[2]
    keys, keep = kv, near(window).dense(m, n, q.device).expand(b, 1, m, n)
    if entries is not None and rate is not None:
        count = entries.shape[2]
        position = torch.arange(length - m, length, device=q.device)
        closed = (position + 1) // rate  # entry w pools tokens w * rate to (w + 1) * rate - 1, which must all be there
        seen = (torch.arange(count, device=q.device) < closed[:, None]).expand(b, m, count)
        if chosen is not None:
            # One column more than there are entries, for what is -1.
            picked = seen.new_zeros(b, m, count + 1).scatter(-1, chosen % (count + 1), True)
            seen = seen & picked[..., :count]
        keys, keep = torch.cat([kv, entries], 2), torch.cat([keep, seen[:, None]], -1)
    o: Tensor = softmax_attention(q, keys, keys, mask=keep, scale=scale, sink=sink, backend="reference")
    return o
