"""Random numbers of a pair of query and key: a hash of where the pair stands, so that a seed replays them anywhere.

Keyed by position: a recomputed backward, another split of the sequence or order of work draws the same ones.
"""

from __future__ import annotations

import torch
from torch import Tensor


def bits(seed: int | Tensor, b: int, h: int, queries: Tensor, keys: Tensor, count: int) -> Tensor:
    """``count`` random bits a pair, int64 ``(b, h, m, n)``: a hash of (seed, batch, head, query and key position).

    ``queries`` ``(m,)`` and ``keys`` ``(n,)`` are absolute positions, int64.
    """
    device = queries.device
    # The seed is mixed alone first: seed 1 of sequence 0 would be seed 0 of sequence 1.
    given = seed.clone() if isinstance(seed, Tensor) else torch.full((), seed, dtype=torch.int64)
    hashed = _mix(given.to(device))
    for axis, index in enumerate((torch.arange(b, device=device), torch.arange(h, device=device), queries, keys)):
        hashed = _mix(hashed ^ index.reshape([-1] + [1] * (3 - axis)))
    return _shift(hashed, 64 - count)


# A weight is dropped by this many of its bits.
DROP_BITS = 24


def drop_below(dropout: float) -> int:
    """Weights whose ``DROP_BITS`` bits are below this are dropped with probability ``dropout``."""
    return int(dropout * (1 << DROP_BITS))


def gumbel(seed: int, b: int, h: int, queries: Tensor, keys: Tensor) -> Tensor:
    """Standard Gumbel noise, float64 ``(b, h, m, n)``; with it added to logits, the largest is a draw of their softmax.

    Positions are as in ``bits``. 52 bits and a half are the most that float64 holds: no logarithm of 0 or of 1.
    """
    uniform = bits(seed, b, h, queries, keys, 52).double().add_(0.5).mul_(2.0**-52)
    return uniform.log_().neg_().log_().neg_()


def _mix(x: Tensor) -> Tensor:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014) on int64, whose products wrap; changes ``x``."""
    x += -0x61C8864680B583EB
    x ^= _shift(x, 30)
    x *= -0x40A7B892E31B1A47
    x ^= _shift(x, 27)
    x *= -0x6B2FB644ECCEEE15
    x ^= _shift(x, 31)
    return x


def _shift(x: Tensor, by: int) -> Tensor:
    shifted = x >> by
    shifted &= (1 << (64 - by)) - 1
    return shifted
