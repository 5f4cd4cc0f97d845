"""A state of fixed size that stands for all tokens so far: it cannot be cropped, and a fork is its snapshot."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Self

import torch
from torch import Tensor


class RecurrentState:
    """Named tensors that every token rewrites, zeros before the first; nothing grows with the length of the sequence.

    Parameters
    ----------
    batch: sequences.
    fields: shape of each tensor a sequence, such as ``{"state": (h, d, e)}``. They are sums over all tokens and so are
        float32 whatever ``dtype`` is, or float64 for that.
    tails: shape of each tensor that only copies inputs, such as the last rows of a short convolution
        ``{"conv": (rows, channels)}``; of ``dtype``.
    """

    def __init__(
        self,
        batch: int,
        fields: Mapping[str, tuple[int, ...]],
        *,
        tails: Mapping[str, tuple[int, ...]] | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        tails = tails or {}
        sizes = [batch, *(size for shape in (*fields.values(), *tails.values()) for size in shape)]
        if not fields or min(sizes) < 1 or fields.keys() & tails.keys():
            given = ", ".join(f"{name} {shape}" for name, shape in (*fields.items(), *tails.items())) or "no tensors"
            raise ValueError(f"RecurrentState got batch {batch} and {given}, expected >= 1 of each and each name once")
        wide = torch.promote_types(dtype, torch.float32)
        self._tensors = {
            name: torch.zeros(batch, *shape, dtype=kind, device=device)
            for shapes, kind in ((fields, wide), (tails, dtype))
            for name, shape in shapes.items()
        }
        self.length = 0

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return sum(x.nbytes for x in self._tensors.values())

    def view(self) -> dict[str, Tensor]:
        """The tensors ``(b, ...)`` themselves, not copies: a kernel may update them in place."""
        return dict(self._tensors)

    def advance(self, tokens: int, **tensors: Tensor) -> None:
        """Put in what the tensors named are after ``tokens`` more tokens."""
        for name, x in tensors.items():
            if name not in self._tensors:
                raise TypeError(f"RecurrentState.advance: got {name!r}, expected some of {list(self._tensors)}")
            held = self._tensors[name]
            if x.shape != held.shape:
                raise ValueError(
                    f"RecurrentState.advance: {name} has shape {tuple(x.shape)}, expected {tuple(held.shape)}"
                )
            if x is not held:
                held.copy_(x)
        self.length += tokens

    def crop(self, length: int) -> None:
        """Refused but for where it changes nothing: what tokens added up to cannot be taken apart."""
        if length != self.length:
            raise NotImplementedError(
                f"RecurrentState.crop: cannot go back from {self.length} to {length} tokens, a sum does not know its "
                f"parts: fork before drafting and go on from the fork"
            )

    def fork(self) -> Self:
        """An independent copy."""
        return self.select(torch.arange(next(iter(self._tensors.values())).shape[0]))

    def select(self, rows: Tensor) -> Self:
        """A new state whose sequence ``i`` is a copy of sequence ``rows[i]`` (beam search, batch changes)."""
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        other._tensors = {name: x.index_select(0, rows.to(x.device)) for name, x in self._tensors.items()}
        return other

    def check(self) -> None:
        """Raise ``AssertionError`` if the bookkeeping is broken."""
        assert self.length >= 0
        assert len({x.shape[0] for x in self._tensors.values()}) == 1
