"""The native kernel: queries that chose a block share its packed keys, no partial result is stored."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnkit import native
from attnkit.masks import causal
from attnkit.mechanisms.moba.gates import block_means
from attnkit.mechanisms.moba.listed import gradients
from attnkit.mechanisms.softmax import softmax_attention
from attnkit.native.softmax import refused, scale_refused
from attnkit.spec import Call

FEWEST_KEYS = 32
"""Gradients of smaller blocks are left to the chunk backend: a tile of 64 keys is then mostly hidden.

On a Zen 4 core it was 10 % faster with blocks of 16 and 2,048 keys, and 40 % slower with blocks of 64 and 4,096 keys.
"""


def rejects(call: Call) -> tuple[str, ...]:
    return refuses(call["q"], call["k"], call["v"], call["scale"])


def declines(call: Call) -> tuple[str, ...]:
    return dearer(call["q"], call["k"], call["v"], call["block"])


def dearer(q: Tensor, k: Tensor, v: Tensor, block: int) -> tuple[str, ...]:
    """Why gradients of chosen blocks are had sooner from the chunk backend."""
    if block >= FEWEST_KEYS or not torch.is_grad_enabled() or not any(x.requires_grad for x in (q, k, v)):
        return ()
    return (f"block is {block}, native gradients of chosen blocks pay from {FEWEST_KEYS} keys on",)


def refuses(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[str, ...]:
    """Why the kernel cannot run this call."""
    reasons = refused(q, v)
    if torch.compiler.is_compiling():
        reasons.append("the call is being compiled, the native kernel runs eagerly only")
    if not scale > 0:
        reasons.append(f"scale is {scale}, the native kernel takes one above 0")
    reasons += scale_refused(scale)
    return tuple(reasons)


def forward(q: Tensor, k: Tensor, v: Tensor, block: int, top: int, scale: float) -> Tensor:
    n = k.shape[2]
    if block * top >= n:
        o: Tensor = softmax_attention(q, k, v, mask=causal(), scale=scale)
        return o
    return attend(q, k, v, _best_blocks(q.detach(), block_means(k, block), n, block, top), block, scale)


def _best_blocks(q: Tensor, means: Tensor, n: int, block: int, top: int) -> Tensor:
    """As ``gates.best_blocks``, int32 and ascending: queries are the last of ``n`` positions."""
    q, means = q if q.stride(3) == 1 else q.contiguous(), means.contiguous()
    (b, h, m, d), (g, c) = q.shape, means.shape[1:3]
    chosen = torch.empty(b, h, m, top - 1, dtype=torch.int32)
    native.run(
        "gates_forward",
        native.pack_gates(
            *(x.data_ptr() for x in (q, means, chosen)),
            *(b, h, g, m, n, c, d, top - 1),
            *q.stride()[:3],
            *(block, torch.get_num_threads(), native.DTYPES[q.dtype]),
        ),
    )
    return chosen


def attend(q: Tensor, k: Tensor, v: Tensor, chosen: Tensor, block: int, scale: float, causal: bool = True) -> Tensor:
    """Each query's own block, up to itself when ``causal``, and its ``chosen`` ``(b, c, m, s)``: ``(b, h, m, e)``."""
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    chosen = chosen.to(torch.int32).contiguous()
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        o: Tensor = _Attend.apply(q, k, v, chosen, block, scale, causal)  # type: ignore[no-untyped-call]
        return o
    return _run(q, k, v, chosen, block, scale, causal, None, None)


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, chosen: Tensor, block: int, scale: float, causal: bool
    ) -> Tensor:
        lse, rest = (q.new_empty(q.shape[:3], dtype=torch.float32) for _ in range(2))
        o = _run(q, k, v, chosen, block, scale, causal, lse, rest)
        ctx.save_for_backward(q, k, v, o, lse, rest, chosen)
        ctx.settings = block, scale, causal
        return o

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_o: Tensor) -> tuple[Tensor | None, ...]:
        (q, k, v, o, lse, rest, chosen), (block, scale, causal) = ctx.saved_tensors, ctx.settings
        found = gradients(q, k, v, o, lse, rest, d_o, chosen, block, scale, causal)
        return (*found, None, None, None, None)


def _run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chosen: Tensor,
    block: int,
    scale: float,
    causal: bool,
    lse: Tensor | None,
    rest: Tensor | None,
) -> Tensor:
    (b, h, m, d), (g, n, e) = q.shape, v.shape[1:]
    o = q.new_empty(b, h, m, e)
    native.run(
        "selected_forward",
        native.pack_selected(
            *(x.data_ptr() for x in (q, k, v, o, chosen)),
            *(0 if x is None else x.data_ptr() for x in (lse, rest)),
            *(b, h, g, chosen.shape[1], m, n, d, e, chosen.shape[3]),
            *(step for x in (q, k, v, o) for step in x.stride()[:3]),
            *(block, torch.get_num_threads(), native.DTYPES[q.dtype], causal, scale),
        ),
    )
    return o
