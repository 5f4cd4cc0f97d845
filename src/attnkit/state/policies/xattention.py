"""XAttention: blocks of a prompt that hold most of the weight, estimated by sums over antidiagonals."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from attnkit.masks import Mask
from attnkit.state.policies.base import Seen
from attnkit.state.policies.prefill import Prefill, in_blocks, of_blocks, per_head, seen_by


@dataclass(frozen=True)
class XAttention(Prefill):
    """For every block of queries the fewest blocks of keys that hold the share ``threshold`` of the estimated weight.

    The estimate takes ``stride`` queries and ``stride`` keys together and adds up the logits of one antidiagonal of
    their tile, query ``stride - 1 - i`` with key ``i``, which every column and every diagonal crosses. The query's own
    block and, with ``sink``, the first are always among those chosen. Candidates are blocks: ``score`` (b, h, rows,
    blocks).

    Source: Xu et al. 2025, arXiv 2503.16428, algorithm 1.
    """

    threshold: float = 0.9
    stride: int = field(default=8, kw_only=True)
    block: int = field(default=128, kw_only=True)
    sink: bool = field(default=True, kw_only=True)

    def __post_init__(self) -> None:
        if not 0 < self.threshold <= 1:
            raise ValueError(f"XAttention: threshold is {self.threshold}, expected more than 0 and at most 1")
        if self.stride < 1 or self.block < 1 or self.block % self.stride:
            raise ValueError(
                f"XAttention: stride is {self.stride} and block {self.block}, expected a divisor of the block"
            )

    def score(self, seen: Seen) -> Tensor:
        """The weight of each block, estimated: sums over its tiles of the softmax over a row of tiles."""
        m, n = seen.q.shape[2], seen.k.shape[2]
        start, s = n - m, self.stride
        # Blocks begin at position 0; the first of a later chunk is filled up with rows of zeros in front.
        q = in_blocks(seen.q, self.block, start % self.block).flatten(2, 3).unflatten(2, (-1, s))
        k = in_blocks(seen.k, self.block).flatten(2, 3).unflatten(2, (-1, s))
        tiles = q.flip(3).flatten(3) @ per_head(k, q.shape[1]).flatten(3).mT * (seen.scale / s)
        first = start // self.block * (self.block // s)
        rows = first + torch.arange(tiles.shape[2], device=q.device)
        columns = torch.arange(tiles.shape[3], device=q.device)
        weights = tiles.masked_fill(columns > rows[:, None], -torch.inf).softmax(-1)
        real = (rows[:, None] + 1) * s > start  # rows of tiles in which some query is
        real = real & (rows[:, None] * s < n)
        r = self.block // s
        cells = (weights * real).reshape(*weights.shape[:2], weights.shape[2] // r, r, -1, r)
        total: Tensor = cells.sum((3, 5))
        return total

    def mask(self, q: Tensor, k: Tensor, scale: float) -> Mask | None:
        if self.threshold == 1:
            return None
        score = self.score(seen_by(q, k, scale))
        order = score.argsort(dim=-1, descending=True, stable=True)
        ordered = score.gather(-1, order)
        before = ordered.cumsum(-1) - ordered
        few = before < self.threshold * score.sum(-1, keepdim=True)
        chosen = torch.zeros_like(score, dtype=torch.bool).scatter_(-1, order, few)
        rows = score.shape[3] - score.shape[2] + torch.arange(score.shape[2], device=q.device)
        chosen |= torch.arange(score.shape[3], device=q.device) == rows[:, None]
        if self.sink:
            chosen[..., 0] = True
        return of_blocks(chosen, self.block, k.shape[2])
