"""The states of a model's layers as one: each layer keeps what its own mixer needs, and all hold the same tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, Self

import torch
from torch import Tensor

from attnkit.state.recurrent import RecurrentState


class State(Protocol):
    """What every decoding state can do, whatever it keeps; what goes in and comes out is between it and its layer."""

    @property
    def length(self) -> int:
        """Tokens held."""

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""

    def crop(self, length: int) -> None:
        """Forget all but the first ``length`` tokens, or raise and change nothing; it depends on lengths alone."""

    def fork(self) -> Self:
        """An independent copy."""

    def select(self, rows: Tensor) -> Self:
        """A new state whose sequence ``i`` is a copy of sequence ``rows[i]``."""

    def check(self) -> None:
        """Raise ``AssertionError`` if the bookkeeping is broken."""


class LayeredState:
    """One state a layer, in the order of the layers: caches, rings and recurrent states side by side.

    Parameters
    ----------
    layers: the layers' states, all of the same length. A layer's ``step`` takes its own, ``layers[i]``.
    """

    def __init__(self, layers: Sequence[State]) -> None:
        self.layers = list(layers)
        lengths = [layer.length for layer in self.layers]
        if len(set(lengths)) != 1:
            raise ValueError(f"LayeredState got states of lengths {lengths}, expected one or more, all of one length")

    @property
    def length(self) -> int:
        """Tokens held."""
        return self.layers[0].length

    @property
    def capacity(self) -> int | None:
        """Tokens a sequence may hold; None where no layer has a limit."""
        limits: list[int | None] = [getattr(layer, "capacity", None) for layer in self.layers]
        return min((limit for limit in limits if limit is not None), default=None)

    @property
    def nbytes(self) -> int:
        """Bytes allocated, over all layers."""
        return sum(layer.nbytes for layer in self.layers)

    def admit(self, tokens: int) -> None:
        """Raise ``ValueError`` unless every layer has room for ``tokens`` more: asked before any of them is fed."""
        if self.capacity is not None and self.length + tokens > self.capacity:
            raise ValueError(
                f"LayeredState: holds {self.length} of {self.capacity} tokens and got {tokens} more: make the state "
                f"with a capacity of at least {self.length + tokens}"
            )

    def snapshot(self) -> None:
        """Let ``crop`` come back to here in layers that cannot go back by themselves, the recurrent ones."""
        for layer in self.layers:
            if isinstance(layer, RecurrentState):
                layer.snapshot()

    def crop(self, length: int) -> None:
        """Forget all but the first ``length`` tokens in every layer; where one layer refuses, none has changed."""
        # Copies of no sequences cost nothing, keep the same books, and so refuse what the layers would refuse.
        for trial in self.select(torch.arange(0)).layers:
            trial.crop(length)
        for layer in self.layers:
            layer.crop(length)

    def fork(self) -> Self:
        """An independent copy."""
        return type(self)([layer.fork() for layer in self.layers])

    def select(self, rows: Tensor) -> Self:
        """A new state whose sequence ``i`` is a copy of sequence ``rows[i]`` (beam search, batch changes)."""
        return type(self)([layer.select(rows) for layer in self.layers])

    def check(self) -> None:
        """Raise ``AssertionError`` if the bookkeeping is broken."""
        for layer in self.layers:
            layer.check()
        assert len({layer.length for layer in self.layers}) == 1
