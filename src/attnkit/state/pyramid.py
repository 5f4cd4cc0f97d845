"""Keys and values of a pyramid: level ``l`` holds every ``2^l``-th token, and remembers the last result."""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor

from attnkit.state.kv import KVState
from attnkit.state.view import View


class PyramidState:
    """One cache a level, level ``l`` for ``ceil(capacity / 2^l)`` tokens, and each coarser level's last result.

    Parameters
    ----------
    batch, heads: sequences, and KV heads of each.
    levels: of the pyramid, the finest included, which holds every token.
    capacity: tokens a sequence may hold.
    key_size, value_size: channels a head.
    results: query heads, each with a result of ``value_size`` channels to hold between two tokens of a level.
    """

    def __init__(
        self,
        batch: int,
        heads: int,
        levels: int,
        capacity: int,
        key_size: int,
        value_size: int,
        *,
        results: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        if levels < 1 or results < 1:
            raise ValueError(f"PyramidState got {levels} levels and {results} results, expected >= 1 of each")
        self._levels = [
            KVState(batch, heads, -(-capacity // 2**level), key_size, value_size, dtype=dtype, device=device)
            for level in range(levels)
        ]
        self.results = torch.zeros(batch, results, levels - 1, value_size, dtype=dtype, device=device)

    @property
    def length(self) -> int:
        """Tokens held."""
        return self._levels[0].length

    @property
    def capacity(self) -> int:
        """Tokens a sequence may hold."""
        return self._levels[0].capacity

    @property
    def levels(self) -> int:
        """Levels of the pyramid, the finest included."""
        return len(self._levels)

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return sum(level.nbytes for level in self._levels) + self.results.nbytes

    def append(self, level: int, k: Tensor, v: Tensor) -> View:
        """Store the new tokens of a level, keys ``(b, g, m, d)``, values ``(b, g, m, e)``; return all of that level."""
        return self._levels[level].append(k, v)

    def crop(self, length: int) -> None:
        """Forget all but the first ``length`` tokens; refused where a level's result before them is gone."""
        if not 0 <= length <= self.length:
            raise ValueError(f"PyramidState.crop: length is {length}, expected 0 to {self.length}, the tokens appended")
        for level, held in enumerate(self._levels):
            if level and length and -(-length // 2**level) < held.length:
                raise ValueError(
                    f"PyramidState.crop: cannot go back from {self.length} to {length} tokens, level {level} has "
                    f"replaced the result that token {length - 1} stands on: fork before drafting"
                )
        for level, held in enumerate(self._levels):
            held.crop(-(-length // 2**level))

    def fork(self) -> Self:
        """An independent copy."""
        return self.select(torch.arange(self.results.shape[0]))

    def select(self, rows: Tensor) -> Self:
        """A new state whose sequence ``i`` is a copy of sequence ``rows[i]`` (beam search, batch changes)."""
        other = object.__new__(type(self))
        other._levels = [level.select(rows) for level in self._levels]
        other.results = self.results.index_select(0, rows.to(self.results.device))
        return other

    def check(self) -> None:
        """Raise ``AssertionError`` if the bookkeeping is broken."""
        for level, held in enumerate(self._levels):
            held.check()
            assert held.length == -(-self.length // 2**level)
