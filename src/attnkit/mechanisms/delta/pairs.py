"""Products of all pairs of a block's tokens with the decay between the two, and no exponential of a positive number.

Two tokens ``j < i`` of a block of ``2^l`` are parted by exactly one middle: the block's, or that of one of its halves,
of theirs and so on. The decay from ``j`` to ``i`` is that from ``j`` to the middle times that from the middle to ``i``,
so ``sum_c x_ic k_jc exp(g_{j+1,c} + ... + g_ic)`` is a product of two matrices with one of the two factors in each.
Sums of log decays are only ever added, never taken from each other: they lose no digits, and -inf may be among them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Pairs(NamedTuple):
    """``table`` (r, ..., s, s), zeros above its diagonal, and what the log decays of a block add up to.

    ``prefix`` (..., s, d) is the sum from the block's start through each token, ``suffix`` that of the tokens after
    it. ``steps`` holds both for the blocks of each smaller size.
    """

    table: Tensor
    prefix: Tensor
    suffix: Tensor
    steps: list[tuple[Tensor, Tensor]]


def pairs(rows: Tensor, k: Tensor, log_decay: Tensor) -> Pairs:
    """The products of ``rows`` (r, ..., s, d) with ``k`` (..., s, d), for ``log_decay`` (..., s, d), ``s`` = 2^l."""
    table = (rows * k).sum(-1)[..., None, None]  # blocks of one token: (r, ..., s, 1, 1)
    prefix = log_decay[..., None, :]
    suffix = torch.zeros_like(prefix)
    steps = []
    while prefix.shape[-3] > 1:
        steps.append((prefix, suffix))
        (before, after), (rest, none), (upper, lower) = _two(prefix), _two(suffix), _two(table)
        right, left = _halves(rows, prefix)[1] * after.exp(), _halves(k, prefix)[0] * rest.exp()
        bottom = torch.cat([right @ left.mT, lower], -1)
        table = torch.cat([torch.cat([upper, torch.zeros_like(upper)], -1), bottom], -2)
        prefix = torch.cat([before, before[..., -1:, :] + after], -2)
        suffix = torch.cat([rest + after[..., -1:, :], none], -2)
    return Pairs(table[..., 0, :, :], prefix[..., 0, :, :], suffix[..., 0, :, :], steps)


def slopes(
    made: Pairs, rows: Tensor, k: Tensor, d_table: Tensor, d_prefix: Tensor, d_suffix: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``rows``, ``k`` and ``log_decay`` for those of ``table``, ``prefix`` and ``suffix``."""
    d_rows, d_k = torch.zeros_like(rows), torch.zeros_like(k)
    d_table, d_prefix, d_suffix = (x.unsqueeze(-3) for x in (d_table, d_prefix, d_suffix))
    for prefix, suffix in reversed(made.steps):
        size = prefix.shape[-2]
        grown, faded = _two(prefix)[1].exp(), _two(suffix)[0].exp()
        right, left = _halves(rows, prefix)[1] * grown, _halves(k, prefix)[0] * faded
        across = d_table[..., size:, :size]
        d_right, d_left = across @ left, (across.mT @ right).sum(0)
        _halves(d_rows, prefix)[1].add_(d_right * grown)
        _halves(d_k, prefix)[0].add_(d_left * faded)
        (d_upper, d_lower), (d_rest, d_none) = d_prefix.split(size, -2), d_suffix.split(size, -2)
        d_before, d_after = d_upper.clone(), d_lower + (d_right * right).sum(0)
        d_before[..., -1, :] += d_lower.sum(-2)
        d_after[..., -1, :] += d_rest.sum(-2)
        d_prefix, d_suffix = _joined(d_before, d_after), _joined(d_rest + d_left * left, d_none)
        d_table = _joined(d_table[..., :size, :size], d_table[..., size:, size:])
    d_rows += d_table[..., 0] * k
    d_k += (d_table[..., 0] * rows).sum(0)
    return d_rows, d_k, d_prefix[..., 0, :]


def _two(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """The first and the second of each pair of neighbouring blocks (..., blocks, s, any)."""
    one, other = blocks.unflatten(-3, (-1, 2)).unbind(-3)
    return one, other


def _joined(one: Tensor, other: Tensor) -> Tensor:
    """What ``_two`` took apart."""
    return torch.stack([one, other], -3).flatten(-4, -3)


def _halves(tokens: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """Views of tokens (..., s, d): the first and the second of each pair of blocks as long as those of ``like``."""
    one, other = tokens.unflatten(-2, (-1, 2, like.shape[-2])).unbind(-3)
    return one, other
