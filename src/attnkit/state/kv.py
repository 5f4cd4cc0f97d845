"""Contiguous key/value cache, allocated once for all the tokens it may hold."""

from __future__ import annotations

import torch
from torch import Tensor

from attnkit.state.tokens import TokenState
from attnkit.state.view import View


class KVState:
    """Keys and values of every token so far, in one buffer of ``capacity`` tokens; nothing is ever copied to grow.

    Parameters
    ----------
    batch, heads: sequences, and KV heads of each.
    capacity: tokens a sequence may hold; an append past it is refused, so choose prompt plus new tokens.
    key_size, value_size: channels a head.
    """

    def __init__(
        self,
        batch: int,
        heads: int,
        capacity: int,
        key_size: int,
        value_size: int | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        fields = {"k": (heads, key_size), "v": (heads, key_size if value_size is None else value_size)}
        self._tokens = TokenState(batch, capacity, fields, dtype=dtype, device=device, owner="KVState")

    @property
    def length(self) -> int:
        """Tokens held."""
        return self._tokens.length

    @property
    def capacity(self) -> int:
        """Tokens a sequence may hold."""
        return self._tokens.capacity

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return self._tokens.nbytes

    def append(self, k: Tensor, v: Tensor) -> View:
        """Store ``m`` new tokens, keys ``(b, g, m, d)`` and values ``(b, g, m, e)``; return all keys so far."""
        return View(**self._tokens.append(k=k, v=v), length=self._tokens.length)

    def view(self) -> View:
        """All keys and values so far, as slices of the buffers."""
        return View(**self._tokens.view(), length=self._tokens.length)

    def crop(self, length: int) -> None:
        """Forget all but the first ``length`` tokens, as if the others had never been appended."""
        self._tokens.crop(length)

    def fork(self) -> KVState:
        """An independent copy."""
        return self._around(self._tokens.fork())

    def select(self, rows: Tensor) -> KVState:
        """A new state whose sequence ``i`` is a copy of sequence ``rows[i]`` (beam search, batch changes)."""
        return self._around(self._tokens.select(rows))

    def check(self) -> None:
        """Raise ``AssertionError`` if the bookkeeping is broken."""
        self._tokens.check()

    def _around(self, tokens: TokenState) -> KVState:
        other = object.__new__(KVState)
        other._tokens = tokens
        return other
