"""Contiguous key/value cache, allocated once for all the tokens it may hold."""

from __future__ import annotations

import torch
from torch import Tensor

from attnkit import shapes
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
        if min(batch, heads, capacity, key_size) < 1:
            raise ValueError(
                f"KVState got batch {batch}, heads {heads}, capacity {capacity}, key size {key_size}, expected >= 1"
            )
        value_size = key_size if value_size is None else value_size
        # Zeros and not empty: an uninitialised NaN behind a mask is still NaN to a backend that multiplies by 0.
        self._k = torch.zeros(batch, heads, capacity, key_size, dtype=dtype, device=device)
        self._v = torch.zeros(batch, heads, capacity, value_size, dtype=dtype, device=device)
        self.length = 0

    @property
    def capacity(self) -> int:
        return self._k.shape[2]

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return self._k.nbytes + self._v.nbytes

    def append(self, k: Tensor, v: Tensor) -> View:
        """Store ``m`` new tokens, keys ``(b, g, m, d)`` and values ``(b, g, m, e)``; return all keys so far."""
        m = check_new_tokens("KVState.append", k, v, self._k, self._v)
        if self.length + m > self.capacity:
            raise ValueError(
                f"KVState.append: holds {self.length} of {self.capacity} tokens and got {m} more: make the state with "
                f"a capacity of at least {self.length + m}"
            )
        self._k[:, :, self.length : self.length + m] = k
        self._v[:, :, self.length : self.length + m] = v
        self.length += m
        return self.view()

    def view(self) -> View:
        """All keys and values so far, as slices of the buffers."""
        return View(self._k[:, :, : self.length], self._v[:, :, : self.length], self.length)

    def crop(self, length: int) -> None:
        """Forget all but the first ``length`` tokens, as if the others had never been appended."""
        if not 0 <= length <= self.length:
            raise ValueError(f"KVState.crop: length is {length}, expected 0 to {self.length}, the tokens held")
        self.length = length

    def fork(self) -> KVState:
        """An independent copy."""
        return self.select(torch.arange(self._k.shape[0]))

    def select(self, rows: Tensor) -> KVState:
        """A new state whose sequence ``i`` is a copy of sequence ``rows[i]`` (beam search, batch changes)."""
        other = object.__new__(KVState)
        other.__dict__.update(self.__dict__)
        rows = rows.to(self._k.device)
        other._k, other._v = self._k.index_select(0, rows), self._v.index_select(0, rows)
        return other

    def check(self) -> None:
        """Raise ``AssertionError`` if the bookkeeping is broken."""
        assert 0 <= self.length <= self.capacity
        assert self._k.shape[:3] == self._v.shape[:3]


def check_new_tokens(where: str, k: Tensor, v: Tensor, keys: Tensor, values: Tensor) -> int:
    """Number of tokens in ``k`` and ``v`` ``(b, g, m, size)``, after checking that they fit the buffers."""
    m = shapes.check(where, k=(k, "b g m d"), v=(v, "b g m e"))["m"]
    for name, new, held in (("k", k, keys), ("v", v, values)):
        if new.shape[:2] != held.shape[:2] or new.shape[3] != held.shape[3]:
            raise ValueError(
                f"{where}: {name} has shape {tuple(new.shape)}, expected {(*held.shape[:2], m, held.shape[3])} "
                f"(batch, KV heads, tokens, size) to match the state"
            )
        if new.dtype != held.dtype or new.device != held.device:
            raise TypeError(
                f"{where}: {name} is {new.dtype} on {new.device} but the state {held.dtype} on {held.device}: cast one"
            )
    return m
