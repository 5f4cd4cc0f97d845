"""A state of tokens whose past is rewritten by every new one: it cannot be cropped, and a fork is its snapshot."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Self

import torch
from torch import Tensor

from attnkit.state.tokens import TokenState


class RewrittenState(TokenState):
    """Named tensors of every token, which later tokens may ``rewrite``, beside the last rows of one more sequence.

    ``tail`` is ``(b, rows, size)``: what a short convolution still needs of the tokens before, zeros at first. Every
    step replaces it. ``batch``, ``capacity``, ``fields``, ``dtype``, ``device`` and ``dtypes`` are as in
    ``TokenState``, and ``tail`` is given as (rows, size).
    """

    def __init__(
        self,
        batch: int,
        capacity: int,
        fields: Mapping[str, tuple[int, int]],
        tail: tuple[int, int],
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        dtypes: Mapping[str, torch.dtype] | None = None,
    ) -> None:
        super().__init__(batch, capacity, fields, dtype=dtype, device=device, dtypes=dtypes, owner="RewrittenState")
        self.tail = torch.zeros(batch, *tail, dtype=dtype, device=device)

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return super().nbytes + self.tail.nbytes

    def rewrite(self, **tensors: Tensor) -> None:
        """Put new tensors ``(b, heads, w, size)`` in the place of those of the last ``w`` tokens held, or of all."""
        for name, x in tensors.items():
            held = self.view()[name]
            last = held[:, :, max(0, self.length - x.shape[2]) :] if x.dim() == 4 else held
            if x.shape != last.shape:
                raise ValueError(
                    f"RewrittenState.rewrite: {name} has shape {tuple(x.shape)}, expected {tuple(held.shape)} or fewer "
                    f"tokens, the last ones"
                )
            last.copy_(x)

    def crop(self, length: int) -> None:
        """Refused but for where it changes nothing: the tokens to be forgotten have already changed the others."""
        if length != self.length:
            raise NotImplementedError(
                f"RewrittenState.crop: cannot go back from {self.length} to {length} tokens, the later ones have "
                f"rewritten the others: fork before drafting and go on from the fork"
            )

    def select(self, rows: Tensor) -> Self:
        """A new state whose sequence ``i`` is a copy of sequence ``rows[i]`` (beam search, batch changes)."""
        other = super().select(rows)
        other.tail = self.tail.index_select(0, rows.to(self.tail.device))
        return other

    def check(self) -> None:
        """Raise ``AssertionError`` if the bookkeeping is broken."""
        super().check()
        assert self.tail.shape[0] == next(iter(self.view().values())).shape[0]
