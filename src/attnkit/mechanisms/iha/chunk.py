"""One call of softmax attention over all pseudo tokens; under gradients, in blocks of queries where that saves memory.

A flat mask without a window is plain causal attention, and any other one goes to the native kernel as a list of blocks.
torch, which has the gradients, wants such a mask as a dense tensor: so training goes over blocks of queries, each with
the keys it can see, and the backward computes each block again.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from attnkit.blocks import joined, spans
from attnkit.masks import Mask
from attnkit.mechanisms.iha.virtual import Order, pseudo_tokens, visibility
from attnkit.mechanisms.softmax import softmax_attention
from attnkit.positions import Rotary

BLOCK = 512


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mix_q: Tensor,
    mix_k: Tensor,
    mix_v: Tensor,
    collapse: Tensor,
    causal: Order | None,
    window: int | None,
    rotary: Rotary | None,
    scale: float,
) -> Tensor:
    m, n, p = q.shape[2], k.shape[2], mix_q.shape[2]
    queries = pseudo_tokens(q, mix_q, rotary=rotary, start=n - m)
    keys = pseudo_tokens(k, mix_k, rotary=rotary)
    values = pseudo_tokens(v, mix_v)
    if window is not None and window >= n:
        window = None
    mask = visibility(causal, window, p)
    if mask is None or mask.interval() is not None or m * p <= BLOCK or not _trains(queries, keys, values):
        return collapsed(softmax_attention(queries, keys, values, mask=mask, scale=scale), collapse, p).to(q.dtype)

    def parts() -> Iterator[tuple[Any, ...]]:
        for start, end in spans(m, max(1, BLOCK // p)):
            first = 0 if window is None else max(0, n - m + start + 1 - window)
            seen = slice(first * p, (n - m + end) * p)
            yield queries[:, :, start * p : end * p], keys[:, :, seen], values[:, :, seen], mask, scale

    return collapsed(joined(_block, parts()), collapse, p).to(q.dtype)


def _trains(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def _block(q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float) -> Tensor:
    """Queries at the end of the keys they see: the mask knows distances only, so the keys before are not missed."""
    o: Tensor = softmax_attention(q, k, v, mask=mask, scale=scale)
    return o


def collapsed(o: Tensor, collapse: Tensor, p: int) -> Tensor:
    """One result a token and head ``(b, h, m, e)`` of results of pseudo tokens ``(b, h, m * p, e)``."""
    apart, shares = o.unflatten(2, (-1, p)), collapse.to(o.dtype)
    if shares.shape[1] == p:
        return torch.einsum("bhmpe,hp->bhme", apart, shares)
    return torch.einsum("bjmpe,hjp->bhme", apart, shares.unflatten(1, (-1, p)))
