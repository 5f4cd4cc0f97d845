"""The blockwise form: queries of a block walk back over earlier blocks, changed by one d x d matrix a block.

Memory is the n x d of the moved keys, a matrix a block, and one block's logits; training computes each block of
queries again in the backward. The arithmetic is that of softmax attention and as much again for the walk.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import repeat
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from attnkit.blocks import joined, spans
from attnkit.masks import causal
from attnkit.mechanisms.path.householder import Run, lawful
from attnkit.mechanisms.softmax import softmax_attention

# The walk multiplies by d x d, a block's own work is BLOCK x BLOCK a token: both are small next to the rest at 64.
BLOCK = 64
# More tokens than this, those of all heads counted, run some heads after the others. Training asks for tensors of ever
# other sizes, and glibc 2.36 does not fit these into its holes, aligned as torch wants them: for 8 heads of 8,192
# tokens its heap grew to 3.5 GiB, 12 times what was in use. What one part leaves behind serves the next.
TOKENS = 2**14


def forward(q: Tensor, k: Tensor, v: Tensor, w: Tensor, beta: Tensor, log_f: Tensor | None, scale: float) -> Tensor:
    (b, h), (g, n) = q.shape[:2], k.shape[1:3]
    if b * g * n <= TOKENS:
        return _heads(q, k, v, w, beta, log_f, scale)
    together = max(1, TOKENS // (b * n))
    # Split and not sliced: the gradient of a slice is as long as what it was cut from.
    queries, *shared = (x.split(x.shape[1] // g * together, 1) for x in (q, k, v, w, beta))
    gates = [None] * len(queries) if log_f is None else log_f.split(h // g * together, 1)
    parts: Iterator[Any] = zip(queries, *shared, gates, repeat(scale))
    return torch.cat([_heads(*part) for part in parts], 1)


def _heads(q: Tensor, k: Tensor, v: Tensor, w: Tensor, beta: Tensor, log_f: Tensor | None, scale: float) -> Tensor:
    m, n = q.shape[2], k.shape[2]
    work = torch.promote_types(q.dtype, torch.float32)
    w, beta, spoiled = lawful(w, beta, work)
    blocks = -(-n // BLOCK)
    tail = blocks * BLOCK - n
    # A token with beta = 0 and w = 0 reflects nothing, and nobody sees its key: it fills the last block.
    keys, directions = (pad(x.to(work), (0, 0, 0, tail)).unflatten(2, (-1, BLOCK)) for x in (k, w))
    run = Run.of(keys, directions, pad(beta, (0, tail)).unflatten(2, (-1, BLOCK)))
    # Taken apart once: a slice at every use would fill a gradient of the whole tensor for each of them.
    moved, products = run.moved().unbind(2), run.product().unbind(2)
    own = [Run(*parts) for parts in zip(*(x.unbind(2) for x in (run.k, run.w, run.t, run.x)), strict=True)]
    total = None if log_f is None else log_f.to(work).cumsum(-1)
    past = n - m

    def parts() -> Iterator[tuple[Any, ...]]:
        for block, (start, end) in enumerate(spans(n, BLOCK)):
            if past < end or end == n:
                first = max(start, past)
                gates = None if total is None else total[:, :, :end]
                earlier = (own[block], moved[:block], products[:block], spoiled[:, :, first:end])
                yield q[:, :, first - past : end - past].to(work), v[:, :, :end], *earlier, gates, scale

    o: Tensor = joined(_rows, parts())
    return o.to(q.dtype)


def _rows(
    q: Tensor,
    v: Tensor,
    own: Run,
    moved: Sequence[Tensor],
    products: Sequence[Tensor],
    spoiled: Tensor,
    total: Tensor | None,
    scale: float,
) -> Tensor:
    """One block's queries ``(b, h, m, d)`` over all keys to its end.

    ``moved`` (b, g, s, d) and ``products`` (b, g, d, d) are those of each block before.
    """
    (b, h, m, d), (g, n) = q.shape, v.shape[1:3]
    before = len(moved)
    past = n - before * BLOCK - m
    wide = Run(*(x[:, :, None] for x in (own.k, own.w, own.t, own.x)))
    local, at_start = wide.local(q.reshape(b, g, h // g, m, d), past)
    strips, walking = [local.flatten(2, 3)[..., : n - before * BLOCK]], at_start.flatten(2, 3)
    for block in range(before - 1, -1, -1):
        strips.append(walking @ moved[block].mT)
        if block:
            walking = walking - walking @ products[block]
    logits = (torch.cat(strips[::-1], -1) * scale).unflatten(2, (h // g, m)) + spoiled[:, :, None, :, None]
    return known_logits(logits.flatten(1, 2), v, total)


def known_logits(logits: Tensor, v: Tensor, total: Tensor | None) -> Tensor:
    """Causal softmax attention ``(b, h, m, e)`` for given logits ``(b, h, m, n)`` and summed gates ``(b, h, n)``."""
    (b, h, m, n), g = logits.shape, v.shape[1]
    if total is not None:
        logits = logits + (total[:, :, n - m :, None] - total[:, :, None])
    # Its own product of queries and keys is 0.
    none = v.new_zeros(b, h, m, 1), v.new_zeros(b, g, n, 1)
    o: Tensor = softmax_attention(*none, v, mask=causal(), scale=1.0, bias=logits)
    return o


def step(
    q: Tensor, k: Tensor, v: Tensor, w: Tensor, beta: Tensor, total: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """New tokens over a state: see ``path_attention_step``. Keys of the past move on with every block."""
    (b, h, m, d), (g, n) = q.shape, k.shape[1:3]
    work = torch.promote_types(q.dtype, torch.float32)
    w, beta, spoiled = lawful(w, beta, work)
    keys, rows = k[:, :, : n - m].to(work), []
    for start in range(0, m, BLOCK):
        end, known = min(m, start + BLOCK), n - m + min(m, start + BLOCK)
        run = Run.of(k[:, :, n - m + start : known].to(work), w[:, :, start:end], beta[:, :, start:end])
        wide = Run(*(x[:, :, None] for x in (run.k, run.w, run.t, run.x)))
        local, at_start = wide.local(q[:, :, start:end].to(work).reshape(b, g, h // g, -1, d))
        logits = torch.cat([at_start @ keys[:, :, None].mT, local], -1) * scale
        logits = (logits + spoiled[:, :, None, start:end, None]).flatten(1, 2)
        rows.append(known_logits(logits, v[:, :, :known], None if total is None else total[:, :, :known]))
        keys = torch.cat([run.move(keys), run.moved()], 2)
    return torch.cat(rows, 2).to(q.dtype), keys
