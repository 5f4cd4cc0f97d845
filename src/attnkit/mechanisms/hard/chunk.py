"""Blocks of queries whose scores stay within ``ELEMENTS``; the chosen values are gathered and no weights multiplied.

Memory is one block's scores, in the backward as well, where each block is computed again. An interval mask (causal, a
window) also cuts the keys of a block to those in reach.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from attnkit.blocks import joined, spans
from attnkit.masks import Mask
from attnkit.mechanisms.hard.reinforce import log_prob_and_entropy
from attnkit.noise import gumbel

ELEMENTS = 1 << 22
"""Scores at once, 16 MB of float32."""


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask | None,
    scale: float,
    kind: str,
    temperature: float,
    seed: int | None,
    return_log_prob: bool,
) -> Any:
    (b, h, m, _), n = q.shape, k.shape[2]
    settings = (scale, kind, temperature, seed, return_log_prob)
    if b * h * n == 0:
        work = torch.promote_types(q.dtype, torch.float32)
        o, nothing = q.new_zeros(b, h, m, v.shape[3]), q.new_zeros(b, h, m, dtype=work)
        return (o, nothing, nothing.clone()) if return_log_prob else o

    def parts() -> Iterator[tuple[Any, ...]]:
        for start, end in spans(m, max(1, ELEMENTS // (b * h * n))):
            queries = (n - m + start, n - m + end)
            low, high = (0, n) if mask is None else mask.reached(queries, n)
            yield q[:, :, start:end], k[:, :, low:high], v[:, :, low:high], mask, queries, (low, high), *settings

    return joined(_block, parts())


def _block(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask | None,
    queries: tuple[int, int],
    keys: tuple[int, int],
    scale: float,
    kind: str,
    temperature: float,
    seed: int | None,
    return_log_prob: bool,
) -> Any:
    """The queries and keys at these ranges of positions."""
    (b, h, m, d), (g, n) = q.shape, k.shape[1:3]
    work = torch.promote_types(q.dtype, torch.float32)
    asks = (q.to(work) * scale).reshape(b, g, h // g * m, d)
    scores = (asks @ k.to(work).mT).view(b, h, m, n)
    empty = None
    if mask is not None:
        keep = mask.part(queries, keys, q.device)
        # A row without keys takes them all, so that nothing becomes NaN, and loses result and gradient at the end.
        empty = ~keep.any(-1)
        scores = scores.masked_fill(~(keep | empty[..., None]), -torch.inf)
    noisy = scores
    if seed is not None:
        positions = (torch.arange(*span, device=q.device) for span in (queries, keys))
        noisy = scores + gumbel(seed, b, h, *positions).to(work)
    choice = noisy.argmax(-1)  # the first of equals
    rows = torch.arange(b, device=q.device)[:, None, None]
    heads = (torch.arange(h, device=q.device) // (h // g))[:, None]
    o = v[rows, heads, choice]
    if kind != "sample" and torch.is_grad_enabled():
        soft = torch.softmax(noisy if temperature == 1 else noisy / temperature, -1)
        o = StraightThrough.apply(o, soft, v.detach())  # type: ignore[no-untyped-call]
    undefined = noisy.detach().gather(-1, choice[..., None]).isnan()
    found = [o.masked_fill(undefined, torch.nan)]
    if return_log_prob:
        found += log_prob_and_entropy(scores, choice)
    if empty is not None:
        hidden = empty.expand(b, h, m)
        found = [x.masked_fill(hidden[..., None] if x.dim() > 3 else hidden, 0.0) for x in found]
    return tuple(found) if return_log_prob else found[0]


class StraightThrough(Function):
    """``o`` as it is, with the gradient of ``weights @ v`` for the weights: the product itself is never computed."""

    @staticmethod
    def forward(ctx: Any, o: Tensor, weights: Tensor, v: Tensor) -> Tensor:
        ctx.save_for_backward(v)
        ctx.weights = weights.shape, weights.dtype
        return o.view_as(o)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> Any:
        ((slope,), (v,), (shape, work)) = slopes, ctx.saved_tensors, ctx.weights
        (b, h, m, e), g = slope.shape, v.shape[1]
        return slope, (slope.to(work).reshape(b, g, h // g * m, e) @ v.to(work).mT).view(shape), None
