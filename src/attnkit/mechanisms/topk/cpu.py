"""The native kernel, forward only: scores go by in blocks, and each query keeps a list of its best on the way."""

from __future__ import annotations

import torch
from torch import Tensor

from attnkit import native
from attnkit.masks import UNBOUNDED, Mask
from attnkit.mechanisms.softmax import softmax_attention
from attnkit.mechanisms.topk.counts import kept, most
from attnkit.native.softmax import packed, refused, rows
from attnkit.spec import Call

FEWEST_QUERIES = 4
"""Fewer are left to the chunk backend, which packs no keys for them."""


def rejects(call: Call) -> tuple[str, ...]:
    reasons = refused(call["q"], call["v"])
    if torch.compiler.is_compiling():
        reasons.append("the call is being compiled, the native kernel runs eagerly only")
    if torch.is_grad_enabled() and (wanted := [name for name in ("q", "k", "v") if call[name].requires_grad]):
        reasons.append(f"gradients are wanted for {', '.join(wanted)}, the native kernel is forward only")
    return tuple(reasons)


def declines(call: Call) -> tuple[str, ...]:
    m = call["q"].shape[2]
    return (f"there are {m} queries, packing keys pays from {FEWEST_QUERIES} on",) if m < FEWEST_QUERIES else ()


def forward(
    q: Tensor, k: Tensor, v: Tensor, top: int | None, density: float | None, mask: Mask | None, scale: float
) -> Tensor:
    (b, h, m), (n, e) = q.shape[:3], v.shape[2:]
    longest = most(n, top, density)
    if longest >= n:
        o: Tensor = softmax_attention(q, k, v, mask=mask, scale=scale)
        return o
    q, k, v = rows(q), rows(k), rows(v)
    counts = kept(torch.arange(n + 1), top, density).to(torch.int32)
    interval = (UNBOUNDED, UNBOUNDED) if mask is None else mask.interval()
    blocks = None
    if mask is not None and interval is None:
        blocks = mask.block_list(m, n, native.BLOCK_QUERIES, native.BLOCK_KEYS)
    left, right = interval or (UNBOUNDED, UNBOUNDED)
    o = torch.empty((b, h, m, e), dtype=q.dtype)
    native.run(
        "topk_forward",
        packed(q, k, v, o, None, None, blocks, left, right, scale, None, None, None, None, native.PREFILL),
        native.pack_topk(counts.data_ptr(), longest),
    )
    return o
