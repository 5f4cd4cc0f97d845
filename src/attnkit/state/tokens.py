"""Named tensors of every token so far, each in one buffer allocated once for all the tokens it may hold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Self

import torch
from torch import Tensor

from attnkit import shapes
from attnkit.native import memory


class TokenState:
    """What a mechanism keeps of each token, by name, in buffers of ``capacity`` tokens; nothing is copied to grow.

    Parameters
    ----------
    batch: sequences.
    capacity: tokens a sequence may hold; an append past it is refused, so choose prompt plus new tokens.
    fields: heads and channels of each tensor, such as ``{"k": (4, 64), "log_f": (8, 1)}``.
    dtype: of every tensor, but for those that ``dtypes`` names: ``{"log_f": torch.float32}``.
    owner: what error messages call the state.
    """

    def __init__(
        self,
        batch: int,
        capacity: int,
        fields: Mapping[str, tuple[int, int]],
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        dtypes: Mapping[str, torch.dtype] | None = None,
        owner: str = "TokenState",
    ) -> None:
        if not fields or min(batch, capacity, *(size for pair in fields.values() for size in pair)) < 1:
            given = ", ".join(f"{name} {heads} x {size}" for name, (heads, size) in fields.items()) or "no tensors"
            raise ValueError(f"{owner} got batch {batch}, capacity {capacity} and {given}, expected >= 1 of each")
        kept = dtypes or {}
        if unknown := kept.keys() - fields.keys():
            raise ValueError(f"{owner}: dtypes names {sorted(unknown)}, expected some of {list(fields)}")
        # Zeros and not empty: an uninitialised NaN behind a mask is still NaN to a backend that multiplies by 0.
        self._buffers = {
            name: memory.zeros(batch, heads, capacity, size, dtype=kept.get(name, dtype), device=device)
            for name, (heads, size) in fields.items()
        }
        self._owner = owner
        self.length = 0

    @property
    def capacity(self) -> int:
        """Tokens a sequence may hold."""
        return next(iter(self._buffers.values())).shape[2]

    @property
    def buffers(self) -> Mapping[str, Tensor]:
        """The whole tensors ``(b, heads, capacity, size)``, for kernels that read them in place."""
        return self._buffers

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return sum(buffer.nbytes for buffer in self._buffers.values())

    def append(self, **new: Tensor) -> dict[str, Tensor]:
        """Store ``m`` new tokens, a tensor ``(b, heads, m, size)`` for each name; return those of all tokens so far."""
        self.store(**new)
        return self.view()

    def store(self, **new: Tensor) -> None:
        """Store ``m`` new tokens, as ``append`` does."""
        where = f"{self._owner}.append"
        m = check_new_tokens(where, new, self._buffers)
        if self.length + m > self.capacity:
            raise ValueError(
                f"{where}: holds {self.length} of {self.capacity} tokens and got {m} more: make the state with "
                f"a capacity of at least {self.length + m}"
            )
        for name, buffer in self._buffers.items():
            buffer.narrow(2, self.length, m).copy_(new[name])
        self.length += m

    def view(self) -> dict[str, Tensor]:
        """The tensors of all tokens so far ``(b, heads, length, size)``: slices of the buffers, not copies."""
        return {name: buffer.narrow(2, 0, self.length) for name, buffer in self._buffers.items()}

    def crop(self, length: int) -> None:
        """Forget all but the first ``length`` tokens, as if the others had never been appended."""
        if not 0 <= length <= self.length:
            raise ValueError(f"{self._owner}.crop: length is {length}, expected 0 to {self.length}, the tokens held")
        self.length = length

    def fork(self) -> Self:
        """An independent copy."""
        return self.select(torch.arange(next(iter(self._buffers.values())).shape[0]))

    def select(self, rows: Tensor) -> Self:
        """A new state whose sequence ``i`` is a copy of sequence ``rows[i]`` (beam search, batch changes)."""
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        other._buffers = {
            name: buffer.index_select(0, rows.to(buffer.device)) for name, buffer in self._buffers.items()
        }
        return other

    def grown(self, capacity: int, start: int = 0) -> Self:
        """A copy of the tokens from ``start`` on with room for ``capacity``."""
        check_room(f"{self._owner}.grown", capacity, self.length, start)
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        other._buffers, other.length = {}, self.length - start
        for name, held in self.view().items():
            other._buffers[name] = memory.zeros(
                *held.shape[:2], capacity, held.shape[3], dtype=held.dtype, device=held.device
            )
            other._buffers[name][:, :, : other.length] = held[:, :, start:]
        return other

    def reorder(self, rows: Tensor) -> None:
        """Sequence ``i`` becomes a copy of sequence ``rows[i]``, in place."""
        for held in self.view().values():
            held.copy_(held.index_select(0, rows.to(held.device)))

    def check(self) -> None:
        """Raise ``AssertionError`` if the bookkeeping is broken."""
        assert 0 <= self.length <= self.capacity
        assert len({(buffer.shape[0], buffer.shape[2]) for buffer in self._buffers.values()}) == 1


def check_room(where: str, capacity: int, length: int, start: int = 0) -> None:
    """Raise ``ValueError`` unless ``length`` tokens reach to ``start``, and those from there on fit."""
    if not 0 <= start <= length:
        raise ValueError(f"{where}: start is {start}, expected 0 to {length}, the tokens held")
    if capacity < length - start:
        raise ValueError(f"{where}: capacity is {capacity}, expected at least {length - start}, the tokens held")


def check_new_tokens(where: str, new: Mapping[str, Tensor], held: Mapping[str, Tensor]) -> int:
    """Number of tokens in ``new``, tensors ``(b, heads, m, size)``, after checking that they fit the buffers ``held``.

    Raises ``TypeError`` for missing, unknown or wrongly typed tensors and ``ValueError`` for shapes that do not fit.
    """
    if new.keys() != held.keys():
        raise TypeError(f"{where}: got {list(new)}, expected {list(held)}")
    # Every step of decoding comes here for every layer: what fits passes in a few comparisons.
    first = next(iter(new.values()))
    m = first.shape[2] if isinstance(first, Tensor) and first.ndim == 4 else -1
    if m >= 0 and all(_fits(x, held[name], m) for name, x in new.items()):
        return m
    m = shapes.check(where, **{name: (x, f"b {name}_heads m {name}_size") for name, x in new.items()})["m"]
    for name, x in new.items():
        buffer = held[name]
        if x.shape[:2] != buffer.shape[:2] or x.shape[3] != buffer.shape[3]:
            raise ValueError(
                f"{where}: {name} has shape {tuple(x.shape)}, expected {(*buffer.shape[:2], m, buffer.shape[3])} "
                f"(batch, heads, tokens, size) to match the state"
            )
        if x.dtype != buffer.dtype or x.device != buffer.device:
            raise TypeError(
                f"{where}: {name} is {x.dtype} on {x.device} but the state {buffer.dtype} on {buffer.device}: cast one"
            )
    return m


def _fits(x: Tensor, buffer: Tensor, m: int) -> bool:
    b, heads, _, size = buffer.shape
    if not isinstance(x, Tensor) or x.shape != (b, heads, m, size) or x.dtype is not buffer.dtype:
        return False
    return x.is_cpu and buffer.is_cpu and x.layout is torch.strided
