"""States of tokens that go on together, beside one entry for each complete pool of tokens, such as a block's mean."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Self

import torch

from attnkit.state.kv import KVState
from attnkit.state.tokens import TokenState
from attnkit.state.window import WindowState


def pools(length: int, size: int, stride: int) -> int:
    """How many pools of ``size`` tokens, one starting every ``stride`` tokens, are complete after ``length`` tokens."""
    return max(0, (length - size) // stride + 1)


class PooledState:
    """Some states of the same tokens, and tensors with an entry for each pool whose last token is there.

    A pool's entry is made once and for all when the pool is complete, so that cropping tokens only forgets entries.

    Parameters
    ----------
    batch: sequences.
    capacity: tokens a sequence may hold.
    parts: the states by name, each of which gets every token.
    fields: heads and channels of each pooled tensor, such as ``{"mean": (4, 64)}``.
    size, stride: tokens of a pool, and from the start of one pool to that of the next; ``size`` when None.
    dtype: of the pooled tensors.
    """

    def __init__(
        self,
        batch: int,
        capacity: int,
        parts: Mapping[str, KVState | WindowState],
        fields: Mapping[str, tuple[int, int]],
        *,
        size: int,
        stride: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        stride = size if stride is None else stride
        if not parts or min(size, stride) < 1:
            raise ValueError(
                f"PooledState got {len(parts)} parts, size {size} and stride {stride}, expected >= 1 of each"
            )
        self.parts, self.size, self.stride = dict(parts), size, stride
        room = max(1, pools(capacity, size, stride))
        self.pooled = TokenState(batch, room, fields, dtype=dtype, device=device, owner="PooledState")

    @property
    def length(self) -> int:
        """Tokens held."""
        return next(iter(self.parts.values())).length

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return self.pooled.nbytes + sum(part.nbytes for part in self.parts.values())

    def due(self) -> range:
        """The pools that are complete and have no entry yet: those of the tokens appended last."""
        return range(self.pooled.length, pools(self.length, self.size, self.stride))

    def crop(self, length: int) -> None:
        """Forget all but the first ``length`` tokens; refused where a window would see overwritten ones."""
        # On copies, which are small: a refusal must find every part as it was.
        rings = {name: part.fork() for name, part in self.parts.items() if isinstance(part, WindowState)}
        for ring in rings.values():
            ring.crop(length)
        for name, part in self.parts.items():
            if name not in rings:
                part.crop(length)
        self.parts |= rings
        self.pooled.crop(pools(length, self.size, self.stride))

    def fork(self) -> Self:
        """An independent copy."""
        return self._around({name: part.fork() for name, part in self.parts.items()}, self.pooled.fork())

    def select(self, rows: torch.Tensor) -> Self:
        """A new state whose sequence ``i`` is a copy of sequence ``rows[i]`` (beam search, batch changes)."""
        return self._around({name: part.select(rows) for name, part in self.parts.items()}, self.pooled.select(rows))

    def check(self) -> None:
        """Raise ``AssertionError`` if the bookkeeping is broken."""
        for part in self.parts.values():
            part.check()
            assert part.length == self.length
        self.pooled.check()
        assert not self.due()

    def _around(self, parts: dict[str, KVState | WindowState], pooled: TokenState) -> Self:
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        other.parts, other.pooled = parts, pooled
        return other
