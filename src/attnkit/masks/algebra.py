"""The algebra: what a mask answers, and how masks combine.

A mask answers ``visible(b, h, q, k)`` for index tensors holding *absolute* positions: in a call with m queries and n
keys, query ``i`` sits at position ``n - m + i`` and key ``j`` at ``j`` (bottom-right alignment). True may attend.
It also says of a tile of queries and keys whether *some* or *every* pair in it is visible, so that a lowering never
looks at a tile that is empty or full.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from attnkit.masks import lowering

if TYPE_CHECKING:
    from attnkit.masks.lowering import BlockList


class Tiles(NamedTuple):
    """A grid of tiles: inclusive position ranges of queries ``(nq, 1)`` and of keys ``(1, nk)``."""

    q0: Tensor
    q1: Tensor
    k0: Tensor
    k1: Tensor


class Reach(NamedTuple):
    """The keys that a later query can still see: the last ``window`` and the first ``sinks``.

    ``exact`` says that such a query sees all of them, so that a step over exactly these keys needs no mask.
    """

    window: int
    sinks: int
    exact: bool


class Mask:
    """Base of all masks. Subclasses define ``visible`` and, where a tile can be judged cheaply, ``tiles``."""

    batches: int = 1
    heads: int = 1
    length: int | None = None
    """Number of keys the mask was made for, when it was made for one."""

    def visible(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        """Whether the query at position ``q`` may attend to the key at ``k``: bool, the indices broadcast."""
        raise NotImplementedError

    def tiles(self, t: Tiles) -> tuple[Tensor, Tensor]:
        """Two bool ``(batches | 1, heads | 1, nq, nk)``: whether some pair may be visible, whether surely all."""
        shape = (1, 1, t.q0.shape[0], t.k0.shape[1])
        return torch.ones(shape, dtype=torch.bool), torch.zeros(shape, dtype=torch.bool)

    def words(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor | None:
        """``visible`` for the 64 keys from ``k`` on as bits of an int64, lowest first; None where that is no quicker.

        Bits of keys that do not exist may be anything.
        """
        return None

    def interval(self) -> tuple[int, int] | None:
        """``(left, right)`` when ``q - left <= k <= q + right`` says it all, ``UNBOUNDED`` for no bound; else None."""
        return None

    def reach(self) -> Reach | None:
        """What a decoding state has to keep; None when every key may be seen again."""
        return None

    def check(self, b: int, h: int, m: int, n: int) -> None:
        """Raise ``ValueError`` when this mask was made for other sizes than those of the call."""
        for name, mine, theirs in (("batch size", self.batches, b), ("head count", self.heads, h)):
            if mine not in (1, theirs):
                raise ValueError(
                    f"the mask has {name} {mine} but the call has {theirs}: make the mask for {theirs} or 1"
                )

    def extent(self) -> int:
        """A length at which the shape of the mask shows; ``draw`` uses it."""
        return 24

    def __and__(self, other: Mask) -> Mask:
        return And(self, other)

    def __or__(self, other: Mask) -> Mask:
        return Or(self, other)

    def __invert__(self) -> Mask:
        return Not(self)

    def __str__(self) -> str:
        return self.draw()

    def dense(self, m: int, n: int, device: torch.device | str | None = None) -> Tensor:
        """Bool ``(batches, heads, m, n)``."""
        return lowering.dense(self, m, n, device)

    def part(self, queries: tuple[int, int], keys: tuple[int, int], device: torch.device | str | None = None) -> Tensor:
        """The same for queries and keys of a range of positions, for those who go block by block; kept by nobody."""
        return lowering.part(self, queries, keys, device)

    def reached(self, queries: tuple[int, int], n: int) -> tuple[int, int]:
        """The range of the ``n`` keys outside which these queries surely see nothing; empty only without keys."""
        interval = self.interval()
        if interval is None:
            return 0, n
        left, right = interval
        low = max(0, min(queries[0] - left, n - 1))
        return low, min(n, max(low + 1, queries[1] + right))

    def block_list(self, m: int, n: int, block_q: int, block_k: int = 64) -> BlockList:
        """The non-empty tiles and their bits; kept for the next call with the same mask and sizes."""
        return lowering.block_list(self, m, n, block_q, block_k)

    def visible_pairs(self, m: int, n: int) -> int:
        """Exact number of visible (query, key) pairs, summed over the mask's own batches and heads."""
        return lowering.visible_pairs(self, m, n)

    def flex(self, b: int, h: int, m: int, n: int, device: torch.device | str) -> Any:
        """The ``BlockMask`` of ``torch.nn.attention.flex_attention``."""
        from torch.nn.attention.flex_attention import create_block_mask

        def mask_mod(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return self.visible(batch, head, q + (n - m), k)

        batches, heads = (b if self.batches > 1 else None), (h if self.heads > 1 else None)
        return create_block_mask(mask_mod, batches, heads, m, n, device=str(device))

    def draw(self, n: int | None = None, m: int | None = None, cells: int = 24) -> str:
        """A picture for the terminal: ``■`` all visible, ``▪`` some, ``·`` none; at most ``cells`` rows and columns."""
        n = n or self.length or self.extent()
        return lowering.draw(self, m or n, n, cells)


@dataclass(frozen=True, repr=False)
class _Pair(Mask):
    one: Mask
    other: Mask

    def __post_init__(self) -> None:
        if not isinstance(self.other, Mask):
            raise TypeError(f"cannot combine a mask with a {type(self.other).__name__}: wrap a tensor in explicit(...)")
        for axis in ("batches", "heads"):
            sizes = {getattr(self.one, axis), getattr(self.other, axis)} - {1}
            if len(sizes) > 1:
                raise ValueError(
                    f"cannot combine masks made for {' and '.join(map(str, sorted(sizes)))} {axis}: use one"
                )
            object.__setattr__(self, axis, max(sizes, default=1))
        object.__setattr__(self, "length", self.one.length or self.other.length)

    def check(self, b: int, h: int, m: int, n: int) -> None:
        self.one.check(b, h, m, n)
        self.other.check(b, h, m, n)

    def extent(self) -> int:
        return max(self.one.extent(), self.other.extent())


class And(_Pair):
    def visible(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return self.one.visible(b, h, q, k) & self.other.visible(b, h, q, k)

    def words(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor | None:
        one, other = lowering.words(self.one, b, h, q, k), lowering.words(self.other, b, h, q, k)
        return None if one is None or other is None else one & other

    def tiles(self, t: Tiles) -> tuple[Tensor, Tensor]:
        (some, every), (some2, every2) = self.one.tiles(t), self.other.tiles(t)
        return some & some2, every & every2

    def interval(self) -> tuple[int, int] | None:
        one, other = self.one.interval(), self.other.interval()
        return (min(one[0], other[0]), min(one[1], other[1])) if one and other else None

    def reach(self) -> Reach | None:
        one, other = self.one.reach(), self.other.reach()
        if one and other:
            return min(one, other, key=lambda r: r.window + r.sinks)._replace(exact=False)
        found, beside = (one, self.other) if one else (other, self.one)
        return found and found._replace(exact=found.exact and (beside.interval() or (0, -1))[1] == 0)

    def __repr__(self) -> str:
        return f"({self.one!r} & {self.other!r})"


class Or(_Pair):
    def visible(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return self.one.visible(b, h, q, k) | self.other.visible(b, h, q, k)

    def tiles(self, t: Tiles) -> tuple[Tensor, Tensor]:
        (some, every), (some2, every2) = self.one.tiles(t), self.other.tiles(t)
        return some | some2, every | every2

    def reach(self) -> Reach | None:
        one, other = self.one.reach(), self.other.reach()
        if not (one and other):
            return None
        # Window and first tokens together are exact: each key is of one kind or the other.
        split = one.exact and other.exact and (one.sinks == 0) != (other.sinks == 0) and 0 in (one.window, other.window)
        return Reach(max(one.window, other.window), max(one.sinks, other.sinks), split)

    def __repr__(self) -> str:
        return f"({self.one!r} | {self.other!r})"


@dataclass(frozen=True, repr=False)
class Not(Mask):
    inner: Mask

    def __post_init__(self) -> None:
        object.__setattr__(self, "batches", self.inner.batches)
        object.__setattr__(self, "heads", self.inner.heads)
        object.__setattr__(self, "length", self.inner.length)

    def visible(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return ~self.inner.visible(b, h, q, k)

    def tiles(self, t: Tiles) -> tuple[Tensor, Tensor]:
        some, every = self.inner.tiles(t)
        return ~every, ~some

    def check(self, b: int, h: int, m: int, n: int) -> None:
        self.inner.check(b, h, m, n)

    def extent(self) -> int:
        return self.inner.extent()

    def __repr__(self) -> str:
        return f"~{self.inner!r}"
