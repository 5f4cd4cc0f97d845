"""Masks that hold a tensor: documents, padding, block layouts, explicit masks, reordered keys."""

from __future__ import annotations

import hashlib
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from attnkit.masks.algebra import Mask, Tiles
from attnkit.masks.patterns import chunk_of


class Held(Mask):
    """A mask that holds a tensor; equal when the contents are, so that lowerings can be kept."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    @cached_property
    def _digest(self) -> tuple[Any, ...]:
        data = self.tensor.detach().cpu().contiguous()
        content = hashlib.blake2b(data.numpy().tobytes(), digest_size=16).digest()
        return type(self), data.dtype, tuple(data.shape), content, *self._extra()

    def _extra(self) -> tuple[Any, ...]:
        return ()

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Held) and self._digest == other._digest)

    def __hash__(self) -> int:
        return hash(self._digest)

    def __repr__(self) -> str:
        return f"{type(self).__name__.lower()}({'x'.join(map(str, self.tensor.shape))})"

    def _of(self, index: Tensor) -> Tensor:
        return self.tensor.to(index.device)

    def _length(self, n: int, what: str) -> None:
        if self.tensor.shape[-1] != n:
            raise ValueError(
                f"{what} has length {self.tensor.shape[-1]} but there are {n} keys: give it one entry a key"
            )


class Documents(Held):
    """Query and key lie in the same document. Ids ``(batch | 1, n)``."""

    def __init__(self, ids: Tensor) -> None:
        super().__init__(ids)
        self.batches, self.length = ids.shape

    def visible(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        ids, batch = self._of(k), b * (self.batches > 1)
        return ids[batch, q] == ids[batch, k]

    def tiles(self, t: Tiles) -> tuple[Tensor, Tensor]:
        q, k = self._span(t.q0[:, 0], t.q1[:, 0]), self._span(t.k0[0], t.k1[0])
        (qlo, qhi), (klo, khi) = (x[:, None, :, :, None] for x in q), (x[:, None, :, None, :] for x in k)
        qlo, qhi, klo, khi = qlo[:, :, 0], qhi[:, :, 0], klo[:, :, 0], khi[:, :, 0]
        return (qlo <= khi) & (klo <= qhi), (qlo == qhi) & (klo == khi) & (qlo == klo)

    def _span(self, lo: Tensor, hi: Tensor) -> Any:
        index = (lo[:, None] + torch.arange(int((hi - lo).max()) + 1)).minimum(hi[:, None])
        found = self._of(lo)[:, index]
        return found.amin(-1)[:, None], found.amax(-1)[:, None]

    def check(self, b: int, h: int, m: int, n: int) -> None:
        super().check(b, h, m, n)
        self._length(n, "documents")
        if m > n:
            raise ValueError(f"documents needs queries that are among the keys, but got {m} queries and {n} keys")


class Padding(Held):
    """The key is a real token. Keep ``(batch | 1, n)`` bool."""

    def __init__(self, keep: Tensor) -> None:
        super().__init__(keep)
        self.batches, self.length = keep.shape

    def visible(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return self._of(k)[b * (self.batches > 1), k] & (q == q)

    def tiles(self, t: Tiles) -> tuple[Tensor, Tensor]:
        total = torch.nn.functional.pad(self._of(t.k0).long().cumsum(-1), (1, 0))
        kept = total[:, t.k1[0] + 1] - total[:, t.k0[0]]
        shape = (self.batches, 1, t.q0.shape[0], t.k0.shape[1])
        some, every = kept > 0, kept == t.k1[0] - t.k0[0] + 1
        return some[:, None, None].expand(shape), every[:, None, None].expand(shape)

    def check(self, b: int, h: int, m: int, n: int) -> None:
        super().check(b, h, m, n)
        self._length(n, "padding")


class BlockSparse(Held):
    """The block of the query sees the block of the key. Layout ``(heads | 1, blocks, blocks)`` bool."""

    def __init__(self, layout: Tensor, block: int) -> None:
        super().__init__(layout)
        self.block, self.heads, self.length = block, layout.shape[0], layout.shape[-1] * block

    def _extra(self) -> tuple[Any, ...]:
        return (self.block,)

    def visible(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return self._of(k)[h * (self.heads > 1), chunk_of(q, self.block), chunk_of(k, self.block)] & (b == b)

    def tiles(self, t: Tiles) -> tuple[Tensor, Tensor]:
        total = torch.nn.functional.pad(self._of(t.q0).long().cumsum(-1).cumsum(-2), (1, 0, 1, 0))
        q0, q1, k0, k1 = (chunk_of(x, self.block) for x in t)
        seen = total[:, q1 + 1, k1 + 1] - total[:, q0, k1 + 1] - total[:, q1 + 1, k0] + total[:, q0, k0]
        return (seen > 0)[None], (seen == (q1 - q0 + 1) * (k1 - k0 + 1))[None]

    def check(self, b: int, h: int, m: int, n: int) -> None:
        super().check(b, h, m, n)
        covered = self.tensor.shape[-1] * self.block
        if n > covered or m > n:
            raise ValueError(
                f"block_sparse covers {covered} positions, got {m} queries and {n} keys: make a larger layout"
            )

    def __repr__(self) -> str:
        return f"block_sparse({'x'.join(map(str, self.tensor.shape))}, {self.block})"


class Explicit(Held):
    """A bool tensor ``(batch | 1, heads | 1, m, n)`` for one call's own queries and keys."""

    def __init__(self, keep: Tensor) -> None:
        super().__init__(keep)
        self.batches, self.heads, _, self.length = keep.shape

    def visible(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        m, n = self.tensor.shape[2:]
        return self._of(k)[b * (self.batches > 1), h * (self.heads > 1), q - (n - m), k]

    def check(self, b: int, h: int, m: int, n: int) -> None:
        super().check(b, h, m, n)
        if tuple(self.tensor.shape[2:]) != (m, n):
            got = "x".join(map(str, self.tensor.shape[2:]))
            raise ValueError(
                f"the mask tensor is {got} but there are {m} queries and {n} keys: give it one entry a pair"
            )


class Moved(Held):
    """``inner`` for keys that are not stored in order: rows and columns stand at the given absolute positions."""

    def __init__(self, inner: Mask, queries: Tensor, keys: Tensor) -> None:
        super().__init__(torch.cat([queries, keys]))
        self.inner, self.m, self.n = inner, queries.numel(), keys.numel()
        self.batches, self.heads, self.length = inner.batches, inner.heads, self.n

    def _extra(self) -> tuple[Any, ...]:
        return self.inner, self.m

    def visible(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        positions = self._of(k)
        return self.inner.visible(b, h, positions[q - (self.n - self.m)], positions[self.m + k])

    def check(self, b: int, h: int, m: int, n: int) -> None:
        if (m, n) != (self.m, self.n):
            raise ValueError(f"the mask was moved for {self.m} queries and {self.n} keys but the call has {m} and {n}")
