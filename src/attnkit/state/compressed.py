"""The last vectors of a sequence one by one, and entries that each stand for a whole window of its tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from attnkit.state.tokens import check_new_tokens


@dataclass(frozen=True)
class Closed:
    """Tokens whose windows are whole and not yet an entry: values and gates ``(b, 1, tokens, width)``.

    ``before`` is the first half of their channels for the window before, where windows overlap and there is one.
    """

    values: Tensor
    gates: Tensor
    before: tuple[Tensor, Tensor] | None = None


class CompressedState:
    """A ring of the last ``window - 1`` vectors, and beside it streams of entries, one entry for ``rate`` tokens.

    A stream is fed values and gates of tokens, gives back those whose windows have become whole (``append``), and takes
    what they are pooled into (``extend``). It holds no token longer than that, but for series ``a`` of the last whole
    window, where windows overlap.

    Parameters
    ----------
    batch: sequences.
    capacity: tokens a sequence may hold; an append past it is refused, so choose prompt plus new tokens.
    window: tokens that a query sees one by one, its own included.
    size: channels of a vector.
    rate: tokens of an entry.
    streams: channels of an entry of each stream, such as ``{"entries": 512, "index": 128}``; empty without entries.
    overlap: tokens bring two series, twice the channels, and an entry reads the first of the window before.
    """

    def __init__(
        self,
        batch: int,
        capacity: int,
        window: int,
        size: int,
        *,
        rate: int = 1,
        streams: Mapping[str, int] | None = None,
        overlap: bool = False,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        streams = streams or {}
        if min(batch, capacity, window, size, rate, *streams.values()) < 1:
            raise ValueError(
                f"CompressedState got batch {batch}, capacity {capacity}, window {window}, size {size}, rate {rate} "
                f"and streams {dict(streams)}, expected >= 1 of each"
            )
        self.capacity, self.window, self.rate, self.overlap, self.length = capacity, window, rate, overlap, 0
        self._streams = tuple(streams)
        shapes = {"kv": (min(window - 1, capacity), size)}
        for name, width in streams.items():
            shapes[name] = (capacity // rate, width)
            for kind in ("values", "gates"):
                shapes[f"{name}_{kind}"] = (min(rate - 1, capacity), 2 * width if overlap else width)
                if overlap:
                    shapes[f"{name}_{kind}_before"] = (rate, width)
        self._buffers = {
            name: torch.zeros(batch, 1, *shape, dtype=dtype, device=device) for name, shape in shapes.items()
        }

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return sum(buffer.nbytes for buffer in self._buffers.values())

    def append(self, kv: Tensor, **new: Tensor) -> tuple[Tensor, dict[str, Closed]]:
        """Store ``m`` new tokens, vectors ``(b, 1, m, size)`` and ``<stream>_values`` and ``<stream>_gates``.

        Returns the vectors that the new tokens may see, in order and their own at the end, and for each stream the
        tokens of the windows that are whole now, which ``extend`` waits for.
        """
        fed = [f"{name}_{kind}" for name in self._streams for kind in ("values", "gates")]
        m = check_new_tokens(
            "CompressedState.append", {"kv": kv, **new}, {name: self._buffers[name] for name in ("kv", *fed)}
        )
        if self.length + m > self.capacity:
            raise ValueError(
                f"CompressedState.append: holds {self.length} of {self.capacity} tokens and got {m} more: make the "
                f"state with a capacity of at least {self.length + m}"
            )
        seen = torch.cat([self._ring(), kv], 2)
        closed = {name: self._closed(name, new[f"{name}_values"], new[f"{name}_gates"]) for name in self._streams}
        self.length += m
        ring = self._buffers["kv"]
        if kept := min(m, ring.shape[2]):
            slots = torch.arange(self.length - kept, self.length, device=kv.device) % ring.shape[2]
            ring[:, :, slots] = kv[:, :, m - kept :]
        return seen, closed

    def extend(self, **entries: Tensor) -> dict[str, Tensor]:
        """Store the entries of the windows that the last ``append`` closed; return all of each stream."""
        done = self.length // self.rate
        for name, x in entries.items():
            buffer = self._buffers[name]
            if x.shape[2] > done or x.shape[3] != buffer.shape[3]:
                raise ValueError(
                    f"CompressedState.extend: {name} has shape {tuple(x.shape)}, expected at most {done} entries of "
                    f"{buffer.shape[3]} channels: those of the windows just closed"
                )
            buffer[:, :, done - x.shape[2] : done] = x
        return {name: self._buffers[name][:, :, :done] for name in entries}

    def view(self) -> dict[str, Tensor]:
        """The vectors kept, in order, and all entries of each stream."""
        done = self.length // self.rate
        return {"kv": self._ring()} | {name: self._buffers[name][:, :, :done] for name in self._streams}

    def crop(self, length: int) -> None:
        """Forget all but the first ``length`` tokens; refused where what a next token needs of them is gone."""
        if not 0 <= length <= self.length:
            raise ValueError(f"CompressedState.crop: length is {length}, expected 0 to {self.length}, the tokens held")
        oldest = max(0, self.length - self._buffers["kv"].shape[2])
        overwritten = self.window > 1 and max(0, length + 1 - self.window) < oldest
        drained = bool(self._streams) and length // self.rate != self.length // self.rate
        if 0 < length < self.length and (overwritten or drained):
            lost = (
                f"the window of {self.window} has overwritten vectors that would be visible"
                if overwritten
                else f"tokens of a window of {self.rate} have become an entry"
            )
            raise ValueError(
                f"CompressedState.crop: cannot go back from {self.length} to {length} tokens, {lost}: crop less, or "
                f"keep a fork"
            )
        self.length = length

    def fork(self) -> Self:
        """An independent copy."""
        return self.select(torch.arange(self._buffers["kv"].shape[0]))

    def select(self, rows: Tensor) -> Self:
        """A new state whose sequence ``i`` is a copy of sequence ``rows[i]`` (beam search, batch changes)."""
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        other._buffers = {name: x.index_select(0, rows.to(x.device)) for name, x in self._buffers.items()}
        return other

    def check(self) -> None:
        """Raise ``AssertionError`` if the bookkeeping is broken."""
        assert 0 <= self.length <= self.capacity
        assert len({buffer.shape[0] for buffer in self._buffers.values()}) == 1

    def _ring(self) -> Tensor:
        """The vectors kept, in the order of their tokens."""
        ring = self._buffers["kv"]
        if self.length <= ring.shape[2]:
            return ring[:, :, : self.length]
        oldest = self.length % max(1, ring.shape[2])
        return torch.cat([ring[:, :, oldest:], ring[:, :, :oldest]], 2)

    def _closed(self, name: str, *new: Tensor) -> Closed:
        """Take up values and gates of new tokens; give back those of whole windows, and keep the rest."""
        waiting, whole = self.length % self.rate, (self.length % self.rate + new[0].shape[2]) // self.rate * self.rate
        found, before = [], []
        for kind, x in zip(("values", "gates"), new, strict=True):
            buffer = self._buffers[f"{name}_{kind}"]
            x = torch.cat([buffer[:, :, :waiting], x], 2)
            buffer[:, :, : x.shape[2] - whole] = x[:, :, whole:]
            found.append(x[:, :, :whole])
            if self.overlap:
                last = self._buffers[f"{name}_{kind}_before"]
                before.append(last.clone())
                if whole:
                    last.copy_(x[:, :, whole - self.rate : whole, : last.shape[3]])
        first = self.length < self.rate
        return Closed(found[0], found[1], None if first or not self.overlap else (before[0], before[1]))
