"""Blocks of tokens: a block's queries meet the lookahead keys as they stand, and then the block moves these keys on.

Forward and decoding walk over blocks of queries. The backward walks over blocks of keys instead: a block's lookahead
keys at the start of every later block are n x d numbers, which is little to compute again, while those of all keys are
n x n. Neither keeps more than one block's logits, ``BLOCK x n`` a head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

from attnkit.masks import causal
from attnkit.mechanisms.softmax import softmax_attention

# What a block adds to every pair of tokens is a product over BLOCK next to products over the head size.
BLOCK = 64


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lookahead_q: Tensor,
    lookahead_k: Tensor,
    lookahead_v: Tensor,
    window: int,
    scale: float,
    lookahead_scale: float,
) -> Tensor:
    o: Tensor
    o, _ = _Castle.apply(  # type: ignore[no-untyped-call]
        q, k, v, lookahead_q, lookahead_k, lookahead_v, window, scale, lookahead_scale
    )
    return o


def step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lookahead_q: Tensor,
    lookahead_k: Tensor,
    lookahead_v: Tensor,
    u: Tensor,
    window: int,
    scale: float,
    lookahead_scale: float,
) -> tuple[Tensor, Tensor]:
    """New tokens over a state: see ``castle_attention_step``."""
    still = u.shape[2] - lookahead_q.shape[2]
    moving = u[:, :, still:].clone()
    o, _ = _walk(
        q, k, v, lookahead_q, lookahead_k, lookahead_v, u[:, :, :still], moving, window, scale, lookahead_scale
    )
    return o, moving


def _walk(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lookahead_q: Tensor,
    lookahead_k: Tensor,
    lookahead_v: Tensor,
    still: Tensor,
    moving: Tensor,
    window: int,
    scale: float,
    lookahead_scale: float,
) -> tuple[Tensor, Tensor]:
    """Outputs ``(b, h, m, e)`` and log-sum-exps of the last ``m`` tokens.

    ``still`` and ``moving``, one after the other, are the lookahead keys before the new tokens, which are those of
    ``lookahead_k`` and ``lookahead_v``. ``moving`` and ``lookahead_q`` are of the last tokens, all that the new ones
    may change; ``moving`` is changed.
    """
    (b, h, m, _), n, new, held = q.shape, k.shape[2], lookahead_k.shape[2], moving.shape[2]
    work = moving.dtype
    o = q.new_empty(b, h, m, v.shape[3])
    lse = torch.empty(b, h, m, dtype=work, device=q.device)
    for start in range(0, new, BLOCK):
        end = min(new, start + BLOCK)
        at, to = held - new + start, held - new + end
        first = max(0, at - window)
        values = lookahead_v[:, :, start:end].to(work)
        taken = _taken(lookahead_q[:, :, first:to].to(work), lookahead_k[:, :, start:end].to(work), lookahead_scale)
        taken = taken.triu(1 + first - at).tril(window + first - at)
        row = max(0, start - (new - m))
        last = end - (new - m)
        if last > row:
            queries, seen = q[:, :, row:last], n - new + end
            scaled = queries.to(work) * lookahead_scale
            met = (scaled @ values.mT).tril(end - start - (last - row))
            strips = [scaled @ still.to(work).mT, scaled @ moving[:, :, :to].mT]
            strips[1][..., first:] += met @ taken.mT
            s = torch.cat(strips, -1)
            o[:, :, row:last], lse[:, :, row:last] = softmax_attention(
                queries,
                k[:, :, :seen],
                v[:, :, :seen],
                mask=causal(),
                scale=scale,
                bias=-s * _sigmoid(s),
                return_lse=True,
            )
        moving[:, :, first:to] += taken @ values
    return o, lse


def _taken(lookahead_q: Tensor, lookahead_k: Tensor, scale: float) -> Tensor:
    return _sigmoid(lookahead_q @ lookahead_k.mT * scale)


def _sigmoid(x: Tensor) -> Tensor:
    """The logistic function; torch's own rounds the last elements of a tensor differently from the others."""
    return torch.reciprocal(1 + torch.exp(-x))


class _Castle(torch.autograd.Function):
    """The walk, and its backward by blocks of keys."""

    @staticmethod
    def forward(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        lookahead_q: Tensor,
        lookahead_k: Tensor,
        lookahead_v: Tensor,
        window: int,
        scale: float,
        lookahead_scale: float,
    ) -> tuple[Tensor, Tensor]:
        keys = torch.zeros_like(lookahead_q, dtype=torch.promote_types(q.dtype, torch.float32))
        none = keys[:, :, :0]
        return _walk(q, k, v, lookahead_q, lookahead_k, lookahead_v, none, keys, window, scale, lookahead_scale)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        *tensors, ctx.window, ctx.scale, ctx.lookahead_scale = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(*tensors, *output)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        found = _backward(saved, slope, ctx.window, ctx.scale, ctx.lookahead_scale)
        return *(x.to(given.dtype) for x, given in zip(found, saved, strict=False)), None, None, None


def _backward(
    saved: tuple[Tensor, ...], slope: Tensor, window: int, scale: float, lookahead_scale: float
) -> tuple[Tensor, ...]:
    """Gradients of the six tensors; ``page.md`` has the formulas, in which a block of keys meets all later queries."""
    q, k, v, lookahead_q, lookahead_k, lookahead_v, o, lse = saved
    work, m, n = lse.dtype, q.shape[2], k.shape[2]
    blocks = -(-n // BLOCK)
    tail = blocks * BLOCK - n

    def cut(x: Tensor, front: int = 0) -> Tensor:
        """``(b, h, blocks, BLOCK, size)``, filled up with tokens of zeros."""
        filled: Tensor = pad(x.to(work), (0, 0, front, tail)).unflatten(2, (blocks, BLOCK))
        return filled

    # The queries that are not there have an infinite log-sum-exp: their weights, and so all their gradients, are 0.
    off = n - m
    q_, slope_ = cut(q, off), cut(slope, off)
    lse_ = pad(lse, (off, tail), value=torch.inf).unflatten(2, (blocks, BLOCK, 1))
    mean = cut((slope.to(work) * o.to(work)).sum(-1, keepdim=True), off)
    k_, v_, lq, lk, lv = (cut(x) for x in (k, v, lookahead_q, lookahead_k, lookahead_v))
    met = (q_ @ lv.mT * lookahead_scale).tril()
    d_q, d_k, d_v, d_lq, d_lk, d_lv, d_met = (torch.zeros_like(x) for x in (q_, k_, v_, lq, lk, lv, met))
    # Tokens of one block are taken up by no more than this many blocks, its own included.
    span = min(blocks, 1 + (BLOCK - 1 + window) // BLOCK)
    near_tokens, own_tokens = torch.arange(span * BLOCK, device=q.device), torch.arange(BLOCK, device=q.device)
    distance = near_tokens.unflatten(0, (span, 1, BLOCK)) - own_tokens[:, None]
    takes = (distance > 0) & (distance <= window)
    for block in range(blocks):
        rest, near = slice(block, None), slice(block, block + span)
        taken = _taken(lq[:, :, block : block + 1], lk[:, :, near], lookahead_scale)
        count = taken.shape[2]
        taken = torch.where(takes[:count], taken, 0.0)
        # The block's lookahead keys at the start of each later block; beyond the window they stand still.
        moves = pad((taken @ lv[:, :, near]).cumsum(2), (0, 0, 0, 0, 1, 0))
        when = torch.arange(blocks - block, device=q.device).clamp(max=count)
        keys = moves[:, :, when]
        s = q_[:, :, rest] @ keys.mT * lookahead_scale
        s[:, :, :count] += met[:, :, near] @ taken.mT
        gate = _sigmoid(s)
        logits = q_[:, :, rest] @ k_[:, :, block : block + 1].mT * scale - s * gate
        weights = torch.exp(logits - lse_[:, :, rest])
        weights[:, :, 0] = weights[:, :, 0].tril()
        d_v[:, :, block] = (weights.mT @ slope_[:, :, rest]).sum(2)
        d_logits = weights * (slope_[:, :, rest] @ v_[:, :, block : block + 1].mT - mean[:, :, rest])
        if block == 0:
            d_logits[:, :, 0, 0] = 0  # the first token sees one key, whose weight is 1 whatever its logit
        d_k[:, :, block] = (d_logits.mT @ q_[:, :, rest]).sum(2) * scale
        d_s = -d_logits * gate * (1 + s * (1 - gate))
        d_q[:, :, rest] += d_logits @ k_[:, :, block : block + 1] * scale + d_s @ keys * lookahead_scale
        d_met[:, :, near] += d_s[:, :, :count] @ taken
        # A move of the keys in one block shows in the products of all blocks after it.
        d_keys = d_s.mT @ q_[:, :, rest] * lookahead_scale
        later = pad(d_keys, (0, 0, 0, 0, 0, 1)).flip(2).cumsum(2).flip(2)[:, :, 1 : count + 1]
        d_lv[:, :, near] += taken.mT @ later
        d_taken = later @ lv[:, :, near].mT + d_s[:, :, :count].mT @ met[:, :, near]
        d_z = d_taken * taken * (1 - taken) * lookahead_scale
        d_lq[:, :, block] = (d_z @ lk[:, :, near]).sum(2)
        d_lk[:, :, near] += d_z.mT @ lq[:, :, block : block + 1]
    d_met = d_met.tril() * lookahead_scale
    d_q += d_met @ lv
    d_lv += d_met.mT @ q_
    whole = (x.flatten(2, 3) for x in (d_q, d_k, d_v, d_lq, d_lk, d_lv))
    return tuple(x[:, :, off:n] if i == 0 else x[:, :, :n] for i, x in enumerate(whole))
