"""Contiguous key/value cache, allocated once for all the tokens it may hold, as numbers or quantised."""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor

from attnkit.state.codec import GROUP, Codec, GroupedKeys, GroupedValues, ScaledRows, checked_codec
from attnkit.state.tokens import TokenState, check_new_tokens, check_room
from attnkit.state.view import Layout, View, layout_of


class KVState:
    """Keys and values of every token so far, in one buffer of ``capacity`` tokens; nothing is ever copied to grow.

    Parameters
    ----------
    batch, heads: sequences, and KV heads of each.
    capacity: tokens a sequence may hold; an append past it is refused, so choose prompt plus new tokens.
    key_size, value_size: channels a head.
    dtype: of what is appended and viewed.
    codec: how numbers are kept: None as they are; "int8", "fp8" or "int4" quantised, see ``attnkit.state.codec``.
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
        codec: Codec | None = None,
    ) -> None:
        value_size = key_size if value_size is None else value_size
        self._tokens: TokenState | CodedTokens
        if checked_codec("KVState", codec) is None:
            fields = {"k": (heads, key_size), "v": (heads, value_size)}
            self._tokens = TokenState(batch, capacity, fields, dtype=dtype, device=device, owner="KVState")
        else:
            assert codec is not None
            self._tokens = CodedTokens(codec, batch, heads, capacity, key_size, value_size, dtype, device)

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

    @property
    def codec(self) -> Codec | None:
        """How numbers are kept."""
        return None if isinstance(self._tokens, TokenState) else self._tokens.codec

    @property
    def rows(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """What is allocated for keys and for values, for kernels: ``numbers``, or codes and their scales."""
        if isinstance(self._tokens, TokenState):
            return {"numbers": self._tokens.buffers["k"]}, {"numbers": self._tokens.buffers["v"]}
        return self._tokens.k.tensors, self._tokens.v.tensors

    @property
    def layout(self) -> Layout:
        """What it takes."""
        return layout_of(**(self._tokens.buffers if isinstance(self._tokens, TokenState) else self._tokens.like))

    def append(self, k: Tensor, v: Tensor) -> View:
        """Store ``m`` new tokens, keys ``(b, g, m, d)`` and values ``(b, g, m, e)``; return all keys so far.

        With a codec, what is returned are converted copies of all tokens: decode through ``store`` and
        ``softmax_attention_step``, which makes none.
        """
        self.store(k, v)
        return self.view()

    def store(self, k: Tensor, v: Tensor) -> None:
        """Store ``m`` new tokens, keys ``(b, g, m, d)`` and values ``(b, g, m, e)``."""
        self._tokens.store(k=k, v=v)

    def view(self) -> View:
        """All keys and values so far: slices of the buffers, or with a codec copies in the state's dtype."""
        return View(**self._tokens.view(), length=self._tokens.length)

    def numbers(self) -> tuple[Tensor, Tensor]:
        """All keys and values in float32 or better: what codes mean, before any rounding to the state's dtype."""
        if isinstance(self._tokens, CodedTokens):
            return self._tokens.numbers()
        held = self._tokens.view()
        return held["k"], held["v"]

    def crop(self, length: int) -> None:
        """Forget all but the first ``length`` tokens, as if the others had never been appended.

        With int4, a length inside a group whose numbers are no longer kept is refused.
        """
        self._tokens.crop(length)

    def fork(self) -> KVState:
        """An independent copy."""
        return self._around(self._tokens.fork())

    def select(self, rows: Tensor) -> KVState:
        """A new state whose sequence ``i`` is a copy of sequence ``rows[i]`` (beam search, batch changes)."""
        return self._around(self._tokens.select(rows))

    def grown(self, capacity: int, start: int = 0) -> KVState:
        """A copy of the tokens from ``start`` on with room for ``capacity``; codes stay as they are.

        int4 keeps whole groups: ``start`` is then a multiple of ``2 GROUP``.
        """
        return self._around(self._tokens.grown(capacity, start))

    def reorder(self, rows: Tensor) -> None:
        """Sequence ``i`` becomes a copy of sequence ``rows[i]``, in place."""
        self._tokens.reorder(rows)

    def check(self) -> None:
        """Raise ``AssertionError`` if the bookkeeping is broken."""
        self._tokens.check()

    def _around(self, tokens: TokenState | CodedTokens) -> KVState:
        other = object.__new__(KVState)
        other._tokens = tokens
        return other


class CodedTokens:
    """What ``TokenState`` is for numbers, for quantised keys and values; ``k`` and ``v`` hold codes and scales."""

    def __init__(
        self,
        codec: Codec,
        batch: int,
        heads: int,
        capacity: int,
        key_size: int,
        value_size: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        if min(batch, heads, capacity, key_size, value_size) < 1:
            raise ValueError(
                f"KVState got batch {batch}, capacity {capacity}, heads {heads} and sizes {key_size} and {value_size}, "
                "expected >= 1 of each"
            )
        self.codec, self.capacity, self.length = codec, capacity, 0
        self.k: ScaledRows | GroupedKeys
        self.v: ScaledRows | GroupedValues
        if codec == "int4":
            self.k = GroupedKeys(batch, heads, capacity, key_size, dtype, device)
            self.v = GroupedValues(batch, heads, capacity, value_size, device)
        else:
            self.k = ScaledRows(codec, batch, heads, capacity, key_size, device)
            self.v = ScaledRows(codec, batch, heads, capacity, value_size, device)
        # No numbers of their own: shapes, dtype and device that new tokens are checked against.
        self.like = {
            name: torch.empty((), dtype=dtype, device=device).expand(batch, heads, 1, size)
            for name, size in (("k", key_size), ("v", value_size))
        }

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for rows in (self.k, self.v) for x in rows.tensors.values())

    def store(self, k: Tensor, v: Tensor) -> None:
        m = check_new_tokens("KVState.append", {"k": k, "v": v}, self.like)
        if self.length + m > self.capacity:
            raise ValueError(
                f"KVState.append: holds {self.length} of {self.capacity} tokens and got {m} more: make the state with "
                f"a capacity of at least {self.length + m}"
            )
        self.k.write(self.length, k)
        self.v.write(self.length, v)
        self.length += m

    def numbers(self) -> tuple[Tensor, Tensor]:
        """All keys and values as float32: what the codes mean, before any rounding to the state's dtype."""
        return self.k.read(self.length), self.v.read(self.length)

    def view(self) -> dict[str, Tensor]:
        k, v = self.numbers()
        dtype = self.like["k"].dtype
        return {"k": k.to(dtype), "v": v.to(dtype)}

    def crop(self, length: int) -> None:
        if not 0 <= length <= self.length:
            raise ValueError(f"KVState.crop: length is {length}, expected 0 to {self.length}, the tokens held")
        if why := self.k.crop(length):
            raise ValueError(f"KVState.crop: cannot go back from {self.length} to {length} tokens: {why}")
        self.length = length

    def grown(self, capacity: int, start: int = 0) -> CodedTokens:
        check_room("KVState.grown", capacity, self.length, start)
        if self.codec == "int4" and start % (2 * GROUP):
            raise ValueError(f"KVState.grown: start is {start}, expected a multiple of {2 * GROUP} with int4")
        k, v = self.like["k"], self.like["v"]
        other = CodedTokens(
            self.codec, k.shape[0], k.shape[1], capacity, k.shape[3], v.shape[3], dtype=k.dtype, device=k.device
        )
        for old, new in ((self.k, other.k), (self.v, other.v)):
            for name, x in old.tensors.items():
                room = new.tensors[name]
                # Of keys in groups the ring stays as it is, and a group has one row of scales.
                grouped = isinstance(old, GroupedKeys) and name != "codes"
                skip = (0 if name == "recent" else start // GROUP) if grouped else start
                most = min(x.shape[2] - skip, room.shape[2])
                room[:, :, :most] = x[:, :, skip : skip + most]
        if isinstance(self.k, GroupedKeys) and isinstance(other.k, GroupedKeys):
            other.k.waiting.kept = max(0, self.k.waiting.kept - start)
        other.length = self.length - start
        return other

    def reorder(self, rows: Tensor) -> None:
        for held in (self.k, self.v):
            for x in held.tensors.values():
                x.copy_(x.index_select(0, rows.to(x.device)))

    def fork(self) -> Self:
        return self.select(torch.arange(self.like["k"].shape[0]))

    def select(self, rows: Tensor) -> Self:
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        other.k, other.v = self.k.select(rows), self.v.select(rows)
        other.like = {name: x[:1].expand(len(rows), *x.shape[1:]) for name, x in self.like.items()}
        return other

    def check(self) -> None:
        assert 0 <= self.length <= self.capacity
