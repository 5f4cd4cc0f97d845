"""Masks that a prefill policy chose after looking at queries and keys: blocks, or columns and diagonals."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from attnkit.masks.algebra import Tiles
from attnkit.masks.held import Held
from attnkit.masks.lowering import packed
from attnkit.masks.patterns import bits_below, chunk_of


class ChosenBlocks(Held):
    """The block of the query sees the block of the key. Layout ``(batch | 1, heads | 1, blocks, blocks)`` bool.

    Blocks are counted from position 0, rows for all of them, those before the first query included.
    """

    def __init__(self, layout: Tensor, block: int) -> None:
        super().__init__(layout)
        self.block, (self.batches, self.heads) = block, layout.shape[:2]

    def _extra(self) -> tuple[Any, ...]:
        return (self.block,)

    def visible(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        batch, head = b * (self.batches > 1), h * (self.heads > 1)
        return self._of(k)[batch, head, chunk_of(q, self.block), chunk_of(k, self.block)]

    def tiles(self, t: Tiles) -> tuple[Tensor, Tensor]:
        total = torch.nn.functional.pad(self._of(t.q0).long().cumsum(-1).cumsum(-2), (1, 0, 1, 0))
        q0, q1, k0, k1 = (chunk_of(x, self.block) for x in t)
        seen = total[:, :, q1 + 1, k1 + 1] - total[:, :, q0, k1 + 1] - total[:, :, q1 + 1, k0] + total[:, :, q0, k0]
        return seen > 0, seen == (q1 - q0 + 1) * (k1 - k0 + 1)


class Lines(Held):
    """A query sees columns, and keys at some distances before it. Marks bool ``(2, batch | 1, heads | 1, n)``.

    ``marks[0]`` are the columns by position, ``marks[1]`` the diagonals by distance.
    """

    def __init__(self, marks: Tensor) -> None:
        super().__init__(marks)
        _, self.batches, self.heads, self.length = marks.shape
        self.length: int

    def visible(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        columns, diagonals = self._of(k)
        batch, head, far = b * (self.batches > 1), h * (self.heads > 1), q - k
        seen: Tensor = columns[batch, head, k] | diagonals[batch, head, far.clamp(min=0)]
        return seen & (far >= 0)

    def words(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        columns, diagonals = self._windows
        batch, head, far = b * (self.batches > 1), h * (self.heads > 1), q - k
        seen = columns[batch, head, k] | diagonals[batch, head, (self.length - 1 - far).clamp(max=self.length - 1)]
        own: Tensor = seen & bits_below(far + 1)
        return own

    @cached_property
    def _windows(self) -> Tensor:
        """Words ``(2, batch | 1, heads | 1, n)``: 64 columns from each on, and 64 diagonals from each on downward."""
        marks = torch.stack([self.tensor[0], self.tensor[1].flip(-1)])
        return packed(torch.nn.functional.pad(marks, (0, 63)).unfold(-1, 64, 1))

    def tiles(self, t: Tiles) -> tuple[Tensor, Tensor]:
        columns, diagonals = torch.nn.functional.pad(self._of(t.q0).long().cumsum(-1), (1, 0))
        least, most = t.q0 - t.k1, t.q1 - t.k0
        past = most >= 0
        near, far = least.clamp(min=0), most.clamp(min=0)
        lines = columns[:, :, t.k1 + 1] - columns[:, :, t.k0], diagonals[:, :, far + 1] - diagonals[:, :, near]
        some = past & ((lines[0] > 0) | (lines[1] > 0))
        every = (least >= 0) & ((lines[0] == t.k1 - t.k0 + 1) | (lines[1] == far - near + 1))
        return some, every
