"""MInference: three shapes that attention takes in long prompts, of which every head has one.

The paper finds each head's shape once, offline. ``PerHead`` applies what was found.

Source: Jiang et al. 2024, arXiv 2407.02490, sections 3.2 and 3.3, algorithms 1 to 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from attnkit.masks import Mask, global_tokens, window
from attnkit.masks.algebra import Tiles
from attnkit.masks.chosen import Lines
from attnkit.state.policies.base import Seen
from attnkit.state.policies.prefill import Prefill, in_blocks, of_blocks, per_head, seen_by


@dataclass(frozen=True)
class AShape(Prefill):
    """The first ``sinks`` tokens and the last ``local``, the query's own included."""

    sinks: int = 128
    local: int = 1024

    def __post_init__(self) -> None:
        if self.sinks < 0 or self.local < 1:
            raise ValueError(f"AShape: sinks is {self.sinks} and local {self.local}, expected >= 0 and >= 1")

    def mask(self, q: Tensor, k: Tensor, scale: float) -> Mask | None:
        if self.sinks + self.local >= k.shape[2]:
            return None
        return window(self.local) | global_tokens(self.sinks) if self.sinks else window(self.local)


@dataclass(frozen=True)
class VerticalSlash(Prefill):
    """``vertical`` columns and ``slash`` diagonals, those that the ``last`` queries give most weight to.

    The first ``forced`` columns and diagonals are always among them. Candidates are columns and diagonals: ``score``
    (2, b, h, n), columns by position and diagonals by distance.
    """

    vertical: int = 1000
    slash: int = 6096
    last: int = field(default=64, kw_only=True)
    forced: int = field(default=30, kw_only=True)

    def __post_init__(self) -> None:
        if min(self.vertical, self.slash, self.last) < 1 or self.forced < 1:
            raise ValueError(
                f"VerticalSlash: vertical is {self.vertical}, slash {self.slash}, last {self.last} and forced "
                f"{self.forced}, expected at least 1 each"
            )

    def score(self, seen: Seen) -> Tensor:
        """Weight that the last queries give to each column and to each diagonal; infinity for the forced ones."""
        weights = seen.weights(seen.q[:, :, -self.last :])
        w, n = weights.shape[2:]
        # Row i of the last w stands at n - w + i: reversed and moved, column c of a row is what it gives distance c.
        distances = torch.arange(n - w, n, device=weights.device)[:, None] - torch.arange(n, device=weights.device)
        by_distance = weights.new_zeros(*weights.shape[:2], w, n).scatter_add(
            3, distances.clamp(min=0).expand(weights.shape), weights
        )
        scores = torch.stack([weights.sum(2), by_distance.sum(2)])
        scores[..., : self.forced] = torch.inf
        return scores

    def mask(self, q: Tensor, k: Tensor, scale: float) -> Mask | None:
        n = k.shape[2]
        if self.vertical >= n or self.slash >= n:
            return None
        marks = torch.zeros(2, *q.shape[:2], n, dtype=torch.bool, device=q.device)
        for mark, score, count in zip(
            marks, self.score(seen_by(q, k, scale)), (self.vertical, self.slash), strict=True
        ):
            best = score.argsort(dim=-1, descending=True, stable=True)[..., :count]
            mark.scatter_(-1, best, True)
        return Lines(marks)


@dataclass(frozen=True)
class BlockSparse(Prefill):
    """For every block of ``block`` queries the ``blocks`` blocks of keys whose mean is most like the queries' mean.

    Candidates are blocks: ``score`` (b, h, rows, blocks).
    """

    blocks: int = 100
    block: int = field(default=64, kw_only=True)

    def __post_init__(self) -> None:
        if min(self.blocks, self.block) < 1:
            raise ValueError(f"BlockSparse: blocks is {self.blocks} and block {self.block}, expected at least 1 each")

    def score(self, seen: Seen) -> Tensor:
        """The logit of the mean query and the mean key, -inf for blocks that are later."""
        m, n = seen.q.shape[2], seen.k.shape[2]
        start = n - m
        q = _means(seen.q, self.block, start % self.block)
        k = per_head(_means(seen.k, self.block, 0), q.shape[1])
        rows = start // self.block + torch.arange(q.shape[2], device=q.device)
        later = torch.arange(k.shape[2], device=q.device) > rows[:, None]
        return ((q @ k.mT) * seen.scale).masked_fill(later, -torch.inf)

    def mask(self, q: Tensor, k: Tensor, scale: float) -> Mask | None:
        score = self.score(seen_by(q, k, scale))
        best = score.argsort(dim=-1, descending=True, stable=True)[..., : self.blocks]
        chosen = torch.zeros_like(score, dtype=torch.bool).scatter_(-1, best, True)
        return of_blocks(chosen, self.block, k.shape[2])


@dataclass(frozen=True)
class PerHead(Prefill):
    """One policy for each query head, as found offline."""

    policies: Sequence[Prefill]

    def mask(self, q: Tensor, k: Tensor, scale: float) -> Mask | None:
        h, groups = q.shape[1], k.shape[1]
        if len(self.policies) != h:
            raise ValueError(f"PerHead has {len(self.policies)} policies and the call {h} heads, expected one each")
        masks = []
        for head, policy in enumerate(self.policies):
            group = head // (h // groups)
            masks.append(policy.mask(q[:, head : head + 1], k[:, group : group + 1], scale))
        return None if all(mask is None for mask in masks) else _Heads(masks)


class _Heads(Mask):
    """A mask for each head, None for all keys."""

    def __init__(self, masks: Sequence[Mask | None]) -> None:
        self.masks, self.heads = list(masks), len(masks)
        self.batches = max(mask.batches for mask in masks if mask is not None)

    def visible(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        b, h, q, k = torch.broadcast_tensors(b, h, q, k)
        seen = torch.ones_like(q, dtype=torch.bool)
        for head, mask in enumerate(self.masks):
            if mask is not None:
                its = h == head
                seen[its] = mask.visible(b[its], h[its] * 0, q[its], k[its])
        return seen

    def tiles(self, t: Tiles) -> tuple[Tensor, Tensor]:
        parts = []
        for mask in self.masks:
            if mask is None:
                every = torch.ones(1, 1, t.q0.shape[0], t.k0.shape[1], dtype=torch.bool)
                parts.append((every, every))
            else:
                parts.append(mask.tiles(t))
        shape = (self.batches, 1, t.q0.shape[0], t.k0.shape[1])
        some, every = (torch.cat([part[i].expand(shape) for part in parts], 1) for i in (0, 1))
        return some, every


def _means(x: Tensor, block: int, before: int) -> Tensor:
    """The mean of each block of rows of ``x`` (b, h, n, d) that there are, ``before`` of the first being others."""
    ones = x.new_ones(1, 1, x.shape[2], 1)
    return in_blocks(x, block, before).sum(3) / in_blocks(ones, block, before).sum(3)
