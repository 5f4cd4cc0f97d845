"""A ring of the last keys and values, beside the first few: all that a window (with sinks) can still see."""

from __future__ import annotations

import torch
from torch import Tensor

from attnkit.state.tokens import check_new_tokens
from attnkit.state.view import Layout, View, layout_of


class WindowState:
    """Keys and values of the last ``window`` tokens and of the first ``sinks``, whatever the length of the sequence.

    Past the sinks, token ``t`` lives in slot ``sinks + (t - sinks) % window``: the newest overwrites the oldest and
    nothing moves.
    The order of the slots is not that of the tokens: ``View.positions`` says where each stands.
    """

    def __init__(
        self,
        batch: int,
        heads: int,
        window: int,
        key_size: int,
        value_size: int | None = None,
        *,
        sinks: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        if min(batch, heads, window, key_size) < 1 or sinks < 0:
            raise ValueError(
                f"WindowState got batch {batch}, heads {heads}, window {window}, key size {key_size}, sinks {sinks}, "
                "expected >= 1 (sinks >= 0)"
            )
        slots, value_size = sinks + window, key_size if value_size is None else value_size
        self._k = torch.zeros(batch, heads, slots, key_size, dtype=dtype, device=device)
        self._v = torch.zeros(batch, heads, slots, value_size, dtype=dtype, device=device)
        self._positions = torch.full((slots,), -1, dtype=torch.int64, device=device)  # -1: the slot holds no token
        self.window, self.sinks, self.length = window, sinks, 0
        self._held = 0

    @property
    def layout(self) -> Layout:
        """What it takes."""
        return layout_of(self._k, self._v)

    @property
    def nbytes(self) -> int:
        """Bytes allocated for keys and values."""
        return self._k.nbytes + self._v.nbytes

    def append(self, k: Tensor, v: Tensor) -> View:
        """Store ``m`` new tokens; return the keys that *they* may see, those about to be overwritten included.

        One token is written first and the ring itself is returned; several are joined to the kept keys, a copy of at
        most ``sinks + window + m`` tokens, because the oldest keys are visible to the first of them and gone for the
        last.
        """
        m = check_new_tokens("WindowState.append", {"k": k, "v": v}, {"k": self._k, "v": self._v})
        if m == 0:
            return self.view()
        start, self.length = self.length, self.length + m
        new = torch.arange(start, self.length, device=self._k.device)
        if m == 1:
            self._write(k, v, new)
            return self.view()
        old = self._slots()
        view = View(
            torch.cat([self._k[:, :, old], k], 2),
            torch.cat([self._v[:, :, old], v], 2),
            self.length,
            torch.cat([self._positions[old], new]),
        )
        kept = (new < self.sinks) | (new >= self.length - self.window)
        self._write(k[:, :, kept], v[:, :, kept], new[kept])
        return view

    def view(self) -> View:
        """The keys and values held now, in the order of their slots."""
        if self._held == len(self._positions):
            return View(self._k, self._v, self.length, self._positions)
        # Before the first wrap the slots in use are the first ones; after a crop there can be a hole.
        held = slice(self._held) if self._held == self.length else self._slots()
        return View(self._k[:, :, held], self._v[:, :, held], self.length, self._positions[held])

    def crop(self, length: int) -> None:
        """Forget all but the first ``length`` tokens; refused where the next query would see overwritten ones."""
        if not 0 <= length <= self.length:
            raise ValueError(f"WindowState.crop: length is {length}, expected 0 to {self.length}, the tokens appended")
        oldest = max(length + 1 - self.window, self.sinks)  # what the next query sees, the sinks apart
        needed = set(range(oldest, length)) | set(range(min(self.sinks, length)))
        if lost := needed - set(self._positions.tolist()):
            raise ValueError(
                f"WindowState.crop: cannot go back from {self.length} to {length} tokens, the window of {self.window} "
                f"has overwritten token {min(lost)}, which would be visible: crop less, or keep a fork"
            )
        self._positions[self._positions >= length] = -1
        self.length, self._held = length, int((self._positions >= 0).sum())

    def _slots(self) -> Tensor:
        """Slots in use, in the order of their tokens."""
        order = self._positions.argsort()
        return order[len(order) - self._held :]

    def _write(self, k: Tensor, v: Tensor, positions: Tensor) -> None:
        slots = torch.where(positions < self.sinks, positions, self.sinks + (positions - self.sinks) % self.window)
        self._k[:, :, slots], self._v[:, :, slots], self._positions[slots] = k, v, positions
        self._held = min(self.length, len(self._positions))

    def fork(self) -> WindowState:
        """An independent copy."""
        return self.select(torch.arange(self._k.shape[0]))

    def select(self, rows: Tensor) -> WindowState:
        """A new state whose sequence ``i`` is a copy of sequence ``rows[i]``."""
        other = object.__new__(WindowState)
        other.__dict__.update(self.__dict__)
        rows = rows.to(self._k.device)
        other._k, other._v = self._k.index_select(0, rows), self._v.index_select(0, rows)
        other._positions = self._positions.clone()
        return other

    def check(self) -> None:
        """Raise ``AssertionError`` if the bookkeeping is broken."""
        held = self._positions[self._positions >= 0].tolist()
        assert len(held) == len(set(held)) == self._held
        assert all(p < self.sinks or self.length - self.window <= p < self.length for p in held)
