"""A state of fixed size that stands for all tokens so far: it goes back only to where a snapshot was taken."""

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
        self._snapshots: dict[int, dict[str, Tensor]] = {}  # by length, shorter first

    @property
    def nbytes(self) -> int:
        """Bytes allocated, snapshots included."""
        return sum(x.nbytes for tensors in (self._tensors, *self._snapshots.values()) for x in tensors.values())

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

    def snapshot(self, keep: int = 1) -> None:
        """Copy what the tokens so far are, for ``crop`` to come back to; the ``keep`` longest snapshots stay."""
        if keep < 1:
            raise ValueError(f"RecurrentState.snapshot: keep is {keep}, expected at least 1")
        self._snapshots[self.length] = {name: x.clone() for name, x in self._tensors.items()}
        for length in list(self._snapshots)[:-keep]:
            del self._snapshots[length]

    def crop(self, length: int) -> None:
        """Forget all but the first ``length`` tokens; refused but for now and where a snapshot was taken."""
        if length == self.length:
            return
        if length not in self._snapshots:
            raise NotImplementedError(
                f"RecurrentState.crop: cannot go back from {self.length} to {length} tokens, a sum does not know its "
                f"parts: take a snapshot() or fork before drafting"
            )
        for name, x in self._snapshots[length].items():
            self._tensors[name].copy_(x)
        self.length = length
        self._snapshots = {at: tensors for at, tensors in self._snapshots.items() if at <= length}

    def fork(self) -> Self:
        """An independent copy."""
        return self.select(torch.arange(next(iter(self._tensors.values())).shape[0]))

    def select(self, rows: Tensor) -> Self:
        """A new state whose sequence ``i`` is a copy of sequence ``rows[i]`` (beam search, batch changes)."""
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        other._tensors, *copies = (
            {name: x.index_select(0, rows.to(x.device)) for name, x in tensors.items()}
            for tensors in (self._tensors, *self._snapshots.values())
        )
        other._snapshots = dict(zip(self._snapshots, copies, strict=True))
        return other

    def check(self) -> None:
        """Raise ``AssertionError`` if the bookkeeping is broken."""
        assert self.length >= 0 and all(length <= self.length for length in self._snapshots)
        assert len({x.shape[0] for x in self._tensors.values()}) == 1
