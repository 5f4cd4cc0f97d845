"""Masks given by a formula."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from attnkit.costs import interval_pairs
from attnkit.masks.algebra import Mask, Reach, Tiles

UNBOUNDED = 1 << 62
FAR = 1 << 40
"""Farther than any two positions are apart, and far from what an int64 holds."""


def bits_below(count: Tensor) -> Tensor:
    """Words of 64 bits whose first ``count`` are set: none for less than one, all for 64 and more."""
    some = count.clamp(0, 63)
    return torch.where(count >= 64, -1, (torch.ones_like(some) << some) - 1)


def chunk_of(position: Tensor, size: int) -> Tensor:
    """The index of the chunk of ``size`` positions that holds each position."""
    return torch.div(position, size, rounding_mode="floor")


def _multiple(nearest: Tensor, farthest: Tensor, step: int) -> Tensor:
    """Whether the gaps from ``nearest`` to ``farthest`` hold a multiple of ``step`` that is not negative."""
    return chunk_of(farthest, step) * step >= nearest.clamp(min=0)


def _same_chunk(t: Tiles, size: int) -> tuple[Tensor, Tensor]:
    q0, q1, k0, k1 = (chunk_of(x, size) for x in t)
    return (q0 <= k1) & (k0 <= q1), (q0 == q1) & (k0 == k1) & (q0 == k0)


@dataclass(frozen=True, repr=False)
class Interval(Mask):
    """``q - left <= k <= q + right``: causal, windows and full are all of this form."""

    left: int
    right: int

    def visible(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        seen = (q == q) & (k == k)
        if self.right != UNBOUNDED:
            seen = seen & (k <= q + self.right)
        if self.left != UNBOUNDED:
            seen = seen & (k >= q - self.left)
        return seen

    def words(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        far = q - k
        return bits_below(far + (min(self.right, FAR) + 1)) & ~bits_below(far - min(self.left, FAR))

    def tiles(self, t: Tiles) -> tuple[Tensor, Tensor]:
        nearest, farthest = t.q0 - t.k1, t.q1 - t.k0
        some = (farthest >= -self.right) & (nearest <= self.left)
        every = (nearest >= -self.right) & (farthest <= self.left)
        return some[None, None], every[None, None]

    def interval(self) -> tuple[int, int]:
        return self.left, self.right

    def visible_pairs(self, m: int, n: int) -> int:
        left, right = (None if side == UNBOUNDED else side for side in (self.left, self.right))
        return interval_pairs(m, n, left, right)

    def reach(self) -> Reach | None:
        return None if self.left == UNBOUNDED else Reach(self.left + 1, 0, exact=self.right == 0)

    def extent(self) -> int:
        return max([24] + [2 * side + 2 for side in (self.left, self.right) if side != UNBOUNDED])

    def __repr__(self) -> str:
        match (self.left, self.right):
            case (left, right) if left == right:
                return "full()" if left == UNBOUNDED else f"symmetric_window({left})"
            case (left, 0):
                return "causal()" if left == UNBOUNDED else f"window({left + 1})"
            case (left, right):
                return f"Interval(left={left}, right={right})"


@dataclass(frozen=True, repr=False)
class Dilated(Mask):
    window: int
    dilation: int

    def visible(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        gap = q - k
        return (gap >= 0) & (gap <= (self.window - 1) * self.dilation) & (gap % self.dilation == 0)

    def tiles(self, t: Tiles) -> tuple[Tensor, Tensor]:
        nearest, farthest = t.q0 - t.k1, t.q1 - t.k0
        some = (
            (farthest >= 0)
            & (nearest <= (self.window - 1) * self.dilation)
            & _multiple(nearest, farthest, self.dilation)
        )
        return some[None, None], torch.zeros_like(some)[None, None]

    def reach(self) -> Reach:
        return Reach((self.window - 1) * self.dilation + 1, 0, exact=self.dilation == 1)

    def extent(self) -> int:
        return max(24, 2 * self.window * self.dilation)

    def __repr__(self) -> str:
        return f"dilated_window({self.window}, {self.dilation})"


@dataclass(frozen=True, repr=False)
class Strided(Mask):
    stride: int

    def visible(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        gap = q - k
        return (gap >= 0) & ((gap <= self.stride) | (gap % self.stride == 0))

    def tiles(self, t: Tiles) -> tuple[Tensor, Tensor]:
        nearest, farthest = t.q0 - t.k1, t.q1 - t.k0
        some = (farthest >= 0) & ((nearest <= self.stride) | _multiple(nearest, farthest, self.stride))
        every = (nearest >= 0) & (farthest <= self.stride)
        return some[None, None], every[None, None]

    def extent(self) -> int:
        return max(24, 4 * self.stride)

    def __repr__(self) -> str:
        return f"strided({self.stride})"


@dataclass(frozen=True, repr=False)
class Fixed(Mask):
    stride: int
    columns: int

    def visible(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        same = chunk_of(q, self.stride) == chunk_of(k, self.stride)
        return (k <= q) & (same | (k % self.stride >= self.stride - self.columns))

    def tiles(self, t: Tiles) -> tuple[Tensor, Tensor]:
        def summaries(k: Tensor) -> Tensor:  # summary columns at or before k
            return chunk_of(k + 1, self.stride) * self.columns + (
                (k + 1) % self.stride - (self.stride - self.columns)
            ).clamp(min=0)

        meet, same = _same_chunk(t, self.stride)
        some = (t.k0 <= t.q1) & (meet | (summaries(t.k1) > summaries(t.k0 - 1)))
        every = (t.k1 <= t.q0) & same
        return some[None, None], every[None, None]

    def extent(self) -> int:
        return max(24, 4 * self.stride)

    def __repr__(self) -> str:
        return f"fixed({self.stride}, {self.columns})"


@dataclass(frozen=True, repr=False)
class Chunked(Mask):
    chunk: int

    def visible(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return chunk_of(q, self.chunk) == chunk_of(k, self.chunk)

    def tiles(self, t: Tiles) -> tuple[Tensor, Tensor]:
        some, every = _same_chunk(t, self.chunk)
        return some[None, None], every[None, None]

    def reach(self) -> Reach:
        return Reach(self.chunk, 0, exact=False)

    def extent(self) -> int:
        return max(24, 3 * self.chunk)

    def __repr__(self) -> str:
        return f"chunked({self.chunk})"


@dataclass(frozen=True, repr=False)
class Prefix(Mask):
    prompt: int

    def visible(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (k <= q) | (k < self.prompt)

    def tiles(self, t: Tiles) -> tuple[Tensor, Tensor]:
        some = (t.k0 <= t.q1) | (t.k0 < self.prompt)
        every = (t.k1 <= t.q0) | ((t.k1 < self.prompt) & (t.q0 == t.q0))
        return some[None, None], every[None, None]

    def extent(self) -> int:
        return max(24, 2 * self.prompt)

    def __repr__(self) -> str:
        return f"prefix({self.prompt})"


@dataclass(frozen=True, repr=False)
class GlobalTokens(Mask):
    runs: tuple[tuple[int, int], ...]
    """First and last position of each run of global tokens, ascending."""

    @property
    def positions(self) -> list[int]:
        return [position for first, last in self.runs for position in range(first, last + 1)]

    def visible(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        seen = (q != q) | (k != k)
        for first, last in self.runs:
            seen = seen | ((q >= first) & (q <= last)) | ((k >= first) & (k <= last))
        return seen

    def tiles(self, t: Tiles) -> tuple[Tensor, Tensor]:
        marks = torch.tensor(self.positions)

        def count(lo: Tensor, hi: Tensor) -> Tensor:
            return torch.searchsorted(marks, hi.contiguous(), right=True) - torch.searchsorted(marks, lo.contiguous())

        rows, columns = count(t.q0, t.q1), count(t.k0, t.k1)
        some = (rows > 0) | (columns > 0)
        every = (rows == t.q1 - t.q0 + 1) | (columns == t.k1 - t.k0 + 1)
        return some[None, None], every[None, None]

    def reach(self) -> Reach | None:
        (first, last), *others = self.runs
        return Reach(0, last + 1, exact=True) if first == 0 and not others else None

    def extent(self) -> int:
        return max(24, 2 * self.runs[-1][1])

    def __repr__(self) -> str:
        first = self.reach()
        return f"global_tokens({first.sinks if first else self.positions})"


@dataclass(frozen=True, repr=False)
class Predicate(Mask):
    function: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    batches: int = 1
    heads: int = 1

    def visible(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return self.function(b, h, q, k)

    def __repr__(self) -> str:
        return f"predicate({getattr(self.function, '__name__', 'function')})"
