"""The last tokens one by one, and those before as sums over twice as many tokens each time the distance doubles."""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor

from attnkit.state.tokens import check_new_tokens
from attnkit.state.view import View


class SummaryState:
    """Keys and values of the last ``2 block`` tokens at most, and ``block`` sums for each further doubling.

    The sequence is cut into pairs of blocks of ``block 2^l`` tokens for each level ``l``. A token right in such a pair
    sees the left block, as ``block`` sums of ``2^l`` tokens: so a level gathers sums while the newest token is left,
    and is read while it is right. All levels together are a binary clock, whose size is the logarithm of ``capacity``.

    Parameters
    ----------
    batch, heads: sequences, and KV heads of each.
    capacity: tokens a sequence may hold, which decides how many levels there are.
    key_size, value_size: channels a head.
    block: tokens of a block of level 0.
    dtype: of keys and values; sums are float32 at least.
    """

    def __init__(
        self,
        batch: int,
        heads: int,
        capacity: int,
        key_size: int,
        value_size: int,
        *,
        block: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        if min(batch, heads, capacity, key_size, value_size, block) < 1:
            raise ValueError(
                f"SummaryState got batch {batch}, heads {heads}, capacity {capacity}, sizes {key_size} and "
                f"{value_size} and block {block}, expected >= 1 of each"
            )
        self.block, self.capacity, self.length = block, capacity, 0
        levels = max(0, (-(-capacity // block) - 1).bit_length() - 1)  # above the single tokens
        sums = torch.promote_types(dtype, torch.float32)
        sizes = {"k": key_size, "v": value_size}
        self._near, self._sums = (
            {name: torch.zeros(batch, heads, *shape, size, dtype=kept, device=device) for name, size in sizes.items()}
            for shape, kept in (((min(2 * block, capacity),), dtype), ((levels, block), sums))
        )

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return sum(x.nbytes for held in (self._near, self._sums) for x in held.values())

    def pieces(self, m: int) -> list[int]:
        """How to cut the next ``m`` tokens, so that all tokens of a piece see the same sums."""
        pair, cuts = 2 * self.block, [self.length]
        while cuts[-1] < self.length + m:
            cuts.append(min(self.length + m, cuts[-1] // pair * pair + pair))
        return [end - start for start, end in zip(cuts, cuts[1:], strict=False)]

    def append(self, k: Tensor, v: Tensor) -> tuple[View, Tensor]:
        """Store one piece of new tokens, keys ``(b, g, m, d)`` and values ``(b, g, m, e)``.

        Returns what they see, means and single tokens, the latest last; and of how many tokens each is the mean:
        ``(keys,)``, in the dtype of the sums.
        """
        m = check_new_tokens("SummaryState.append", {"k": k, "v": v}, self._near)
        start = self.length
        if start + m > self.capacity:
            raise ValueError(
                f"SummaryState.append: holds {start} of {self.capacity} tokens and got {m} more: make the state with "
                f"a capacity of at least {start + m}"
            )
        if len(self.pieces(m)) > 1:
            raise ValueError(
                f"SummaryState.append: got {m} tokens after {start}, expected pieces that do not cross a multiple of "
                f"{2 * self.block}: cut them as pieces({m}) says"
            )
        seen, counts = [], []
        for level in range(self._sums["k"].shape[2], 0, -1):
            side, place = divmod(start, self.block << level)
            if side % 2:
                seen.append(level)
                counts.append(k.new_full((self.block,), 2**level, dtype=self._sums["k"].dtype))
            elif m:
                slots = torch.arange(place, place + m, device=k.device) >> level
                for name, new in (("k", k), ("v", v)):
                    held = self._sums[name][:, :, level - 1]
                    if place == 0:
                        held.zero_()
                    held.index_add_(2, slots, new.to(held.dtype))
        first = start % (2 * self.block)
        last, found = first + m, {}
        for name, new in (("k", k), ("v", v)):
            self._near[name][:, :, first:last] = new
            means = [(self._sums[name][:, :, level - 1] / 2**level).to(new.dtype) for level in seen]
            found[name] = torch.cat([*means, self._near[name][:, :, :last]], 2)
        self.length += m
        counts.append(k.new_ones(last, dtype=self._sums["k"].dtype))
        return View(**found, length=self.length), torch.cat(counts)

    def crop(self, length: int) -> None:
        """Refused but for where it changes nothing: the tokens to be forgotten are in sums already."""
        if length != self.length:
            raise NotImplementedError(
                f"SummaryState.crop: cannot go back from {self.length} to {length} tokens, the later ones are in sums: "
                f"fork before drafting and go on from the fork"
            )

    def fork(self) -> Self:
        """An independent copy."""
        return self.select(torch.arange(len(self._near["k"])))

    def select(self, rows: Tensor) -> Self:
        """A new state whose sequence ``i`` is a copy of sequence ``rows[i]`` (beam search, batch changes)."""
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        other._near, other._sums = (
            {name: x.index_select(0, rows.to(x.device)) for name, x in held.items()}
            for held in (self._near, self._sums)
        )
        return other

    def check(self) -> None:
        """Raise ``AssertionError`` if the bookkeeping is broken."""
        assert 0 <= self.length <= self.capacity
        assert 2 * self.block << self._sums["k"].shape[2] >= self.capacity
