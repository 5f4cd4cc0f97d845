"""Quantised forms of keys and values inside a ``KVState``. The kernels read these layouts in place.

``int8``
    Bytes ``(b, g, n, d)``, and a float32 scale for each token and head ``(b, g, n)``: a number is ``scale * code``,
    codes are -127 to 127, and ``scale`` is the token's largest magnitude / 127.
``fp8``
    The same with e4m3 codes (sign, 4 bits of exponent, 3 of mantissa, no infinities) and largest magnitude / 448.
    Numbers below the smallest normal code, 2^-6, become 0 or that code: bfloat16 products flush subnormals, so none is
    written.
``int4`` (KIVI, arXiv 2402.02750)
    A number is ``zero + scale * code``, codes are 0 to 15, scale and zero are bfloat16: ``zero`` the largest one that
    is not above the smallest number, ``scale`` the smallest one with which code 15 reaches the largest number, so that
    no number is off by more than half a scale. Keys have them for each channel and each ``GROUP`` tokens ``(b, g, n /
    GROUP, d)``, values for each token and each ``CHANNELS`` channels ``(b, g, n, e / CHANNELS)``. Keys whose group is
    not full yet wait in a ring of two groups in the state's dtype ``(b, g, 2 GROUP, d)``, token ``t`` in slot ``t % (2
    GROUP)``.

    Codes of a token are packed by 128 channels into 64 bytes: channel ``32 j + 2 i + h`` is in byte ``4 i + 2 h + j //
    2``, its lower half for even ``j``. So each 32 bits hold pairs of neighbours 16 bits apart, and a shift and a mask
    make a vector of 32 consecutive channels. A rest of up to 64 channels takes 32 bytes: byte ``2 i + h``.

    A token (with int4 a group) that holds a NaN or an infinity has a scale of NaN: all its numbers are then NaN.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, Self, TypeVar, get_args

import torch
from torch import Tensor

from attnkit.costs import GROUP as GROUP
from attnkit.costs import packed_bytes as packed_bytes
from attnkit.native import memory

_Rows = TypeVar("_Rows")

Codec = Literal["int8", "int4", "fp8"]
CHANNELS = 32
"""Channels of a group of int4 values."""


def checked_codec(where: str, codec: str | None) -> str | None:
    """``codec``, if it is None or one of those above."""
    if codec is not None and codec not in get_args(Codec):
        raise ValueError(f"{where}: codec is {codec!r}, expected None, {', '.join(map(repr, get_args(Codec)))}")
    return codec


class PlainRows:
    """Numbers as they are, ``(b, heads, capacity, size)``."""

    def __init__(self, numbers: Tensor) -> None:
        self.tensors = {"numbers": numbers}

    def encode(self, x: Tensor) -> dict[str, Tensor]:
        return {"numbers": x}

    def decode(self, held: dict[str, Tensor]) -> Tensor:
        return held["numbers"]


class ScaledRows:
    """Rows of codes with one scale each: ``int8`` and ``fp8``."""

    def __init__(self, codec: str, batch: int, heads: int, capacity: int, size: int, device: Any) -> None:
        self.codec = codec
        self.codes = memory.zeros(batch, heads, capacity, size, dtype=torch.uint8, device=device)
        self.scale = memory.zeros(batch, heads, capacity, dtype=torch.float32, device=device)

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {"codes": self.codes, "scale": self.scale}

    def encode(self, x: Tensor) -> dict[str, Tensor]:
        """What is kept of tokens ``x`` ``(b, heads, m, size)``, by the names of ``tensors``."""
        codes, scale = encode_scaled(self.codec, x)
        return {"codes": codes, "scale": scale}

    def decode(self, held: dict[str, Tensor]) -> Tensor:
        """The inverse, as float32."""
        return decode_scaled(self.codec, held["codes"], held["scale"])

    def write(self, start: int, x: Tensor) -> None:
        """Encode tokens ``x`` ``(b, heads, m, size)`` from ``start`` on."""
        _put(self.tensors, start, self.encode(x))

    def read(self, length: int) -> Tensor:
        """The first ``length`` tokens as float32."""
        return self.decode({name: x[:, :, :length] for name, x in self.tensors.items()})

    def crop(self, length: int) -> str | None:
        return None

    def select(self, rows: Tensor) -> Self:
        return _selected(self, self.tensors, rows)


class GroupedValues:
    """int4 codes of values, with scale and zero for each token and group of channels."""

    def __init__(self, batch: int, heads: int, capacity: int, size: int, device: Any) -> None:
        self.size = size
        groups = -(-size // CHANNELS)
        self.codes = memory.zeros(batch, heads, capacity, packed_bytes(size), dtype=torch.uint8, device=device)
        self.scale = memory.zeros(batch, heads, capacity, groups, dtype=torch.bfloat16, device=device)
        self.zero = torch.zeros_like(self.scale)

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {"codes": self.codes, "scale": self.scale, "zero": self.zero}

    def encode(self, x: Tensor) -> dict[str, Tensor]:
        """What is kept of tokens ``x`` ``(b, heads, m, size)``, by the names of ``tensors``."""
        groups = self.scale.shape[3]
        wide = x.float()
        if rest := groups * CHANNELS - self.size:  # repeats the last number, which changes no group's range
            wide = torch.cat([wide, wide[..., -1:].expand(*wide.shape[:-1], rest)], -1)
        scale, zero, codes = encode_affine(wide.unflatten(-1, (groups, CHANNELS)), -1)
        return {"codes": pack(codes.flatten(-2)[..., : self.size]), "scale": scale[..., 0], "zero": zero[..., 0]}

    def decode(self, held: dict[str, Tensor]) -> Tensor:
        """The inverse, as float32."""
        scale, zero = (held[name].float().repeat_interleave(CHANNELS, -1) for name in ("scale", "zero"))
        return zero[..., : self.size] + scale[..., : self.size] * unpack(held["codes"], self.size).float()

    def write(self, start: int, x: Tensor) -> None:
        """Encode tokens ``x`` ``(b, heads, m, size)`` from ``start`` on."""
        _put(self.tensors, start, self.encode(x))

    def read(self, length: int) -> Tensor:
        """The first ``length`` tokens as float32."""
        return self.decode({name: x[:, :, :length] for name, x in self.tensors.items()})

    def crop(self, length: int) -> str | None:
        return None

    def select(self, rows: Tensor) -> Self:
        return _selected(self, self.tensors, rows)


class KeyGroups:
    """int4 codes of keys in full groups of tokens, with scale and zero for each channel of a group."""

    def __init__(self, batch: int, heads: int, groups: int, size: int, device: Any) -> None:
        self.size = size
        self.codes = memory.zeros(batch, heads, groups * GROUP, packed_bytes(size), dtype=torch.uint8, device=device)
        self.scale = memory.zeros(batch, heads, groups, size, dtype=torch.bfloat16, device=device)
        self.zero = torch.zeros_like(self.scale)

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {"codes": self.codes, "scale": self.scale, "zero": self.zero}

    def encode(self, x: Tensor) -> dict[str, Tensor]:
        """What is kept of one group ``x`` ``(b, heads, GROUP, size)``, by the names of ``tensors``."""
        scale, zero, codes = encode_affine(x.float(), 2)
        return {"codes": pack(codes), "scale": scale, "zero": zero}

    def decode(self, held: dict[str, Tensor]) -> Tensor:
        """The tokens of full groups, as float32."""
        scale, zero = (held[name].float()[:, :, :, None] for name in ("scale", "zero"))
        codes = unpack(held["codes"], self.size).unflatten(2, (scale.shape[2], GROUP)).float()
        return torch.Tensor.flatten(zero + scale * codes, 2, 3)


class WaitingKeys:
    """Keys whose group is not full yet, and those of the group before: a ring ``(b, heads, 2 GROUP, size)``."""

    def __init__(self, recent: Tensor, kept: int = 0) -> None:
        self.recent = recent
        self.kept = kept  # tokens from here on are still in the ring

    def take(self, start: int, x: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Take tokens ``x`` ``(b, heads, m, size)`` from ``start`` on; every group that they fill, and its number."""
        taken, m = 0, x.shape[2]
        while taken < m:
            at = start + taken
            count = min(GROUP - at % GROUP, m - taken)
            slot = at % (2 * GROUP)
            self.kept = max(self.kept, (at // GROUP - 1) * GROUP)
            self.recent[:, :, slot : slot + count] = x[:, :, taken : taken + count]
            taken += count
            if (at + count) % GROUP == 0:
                group = at // GROUP
                first = group % 2 * GROUP
                yield group, self.recent[:, :, first : first + GROUP]

    def rest(self, length: int) -> Tensor:
        """The tokens of a sequence of ``length`` that are in no full group, as float32."""
        groups, rest = divmod(length, GROUP)
        first = groups % 2 * GROUP
        return self.recent[:, :, first : first + rest].float()

    def refusal(self, length: int) -> str | None:
        """Why there cannot be ``length`` tokens again, if there cannot: a part of a group needs its numbers."""
        if length % GROUP and length // GROUP * GROUP < self.kept:
            return (
                f"int4 keys are kept as numbers from token {self.kept} on and before that in full groups of {GROUP}: "
                f"crop to a multiple of {GROUP}, or keep a fork"
            )
        return None

    def crop(self, length: int) -> None:
        self.kept = min(self.kept, length)


class GroupedKeys:
    """int4 keys of sequences of one length: full groups, and the ring of those that wait."""

    def __init__(self, batch: int, heads: int, capacity: int, size: int, dtype: torch.dtype, device: Any) -> None:
        # A group more than can be full, so that no tensor is empty and the kernel has an address.
        self.groups = KeyGroups(batch, heads, capacity // GROUP + 1, size, device)
        self.waiting = WaitingKeys(waiting_ring(batch, heads, size, dtype, device))

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {**self.groups.tensors, "recent": self.waiting.recent}

    def write(self, start: int, x: Tensor) -> None:
        """Take tokens ``x`` ``(b, heads, m, size)`` from ``start`` on, and encode every group that they fill."""
        for group, numbers in self.waiting.take(start, x):
            put_group(self.groups.tensors, group, self.groups.encode(numbers))

    def read(self, length: int) -> Tensor:
        """The first ``length`` tokens as float32."""
        groups = length // GROUP
        counts = {"codes": groups * GROUP, "scale": groups, "zero": groups}
        full = {name: x[:, :, : counts[name]] for name, x in self.groups.tensors.items()}
        return torch.cat([self.groups.decode(full), self.waiting.rest(length)], 2)

    def crop(self, length: int) -> str | None:
        """Why there cannot be ``length`` tokens again, if there cannot."""
        if why := self.waiting.refusal(length):
            return why
        self.waiting.crop(length)
        return None

    def select(self, rows: Tensor) -> Self:
        other = object.__new__(type(self))
        other.groups = _selected(self.groups, self.groups.tensors, rows)
        ring = self.waiting.recent
        other.waiting = WaitingKeys(ring.index_select(0, rows.to(ring.device)), self.waiting.kept)
        return other


def waiting_ring(batch: int, heads: int, size: int, dtype: torch.dtype, device: Any) -> Tensor:
    """Room for the keys that wait."""
    return memory.zeros(batch, heads, 2 * GROUP, size, dtype=dtype, device=device)


def put_group(tensors: dict[str, Tensor], group: int, made: dict[str, Tensor]) -> None:
    """Write one encoded group of keys in its place."""
    for name, x in made.items():
        tensors[name][:, :, group * x.shape[2] : (group + 1) * x.shape[2]] = x


def _put(tensors: dict[str, Tensor], start: int, made: dict[str, Tensor]) -> None:
    for name, x in made.items():
        tensors[name][:, :, start : start + x.shape[2]] = x


def _selected(rows_of: _Rows, tensors: dict[str, Tensor], rows: Tensor) -> _Rows:
    other = object.__new__(type(rows_of))
    other.__dict__.update(rows_of.__dict__)
    for name, x in tensors.items():
        setattr(other, name, x.index_select(0, rows.to(x.device)))
    return other


def encode_scaled(codec: str, x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes (uint8, as ``x``) and scale (float32, without the last axis) of numbers ``x``."""
    x = x.float()
    scale = x.abs().amax(-1) / (127 if codec == "int8" else 448)
    scale = torch.where(scale.isfinite(), scale, torch.nan)
    ratio = (x / torch.where(scale > 0, scale, 1.0)[..., None]).nan_to_num(0.0, 0.0, 0.0)
    if codec == "int8":
        return ratio.round().clamp(-127, 127).to(torch.int8).view(torch.uint8), scale
    size, smallest = ratio.abs().clamp(max=448), 2.0**-6
    size = torch.where(size < smallest, torch.where(size < smallest / 2, 0.0, smallest), size)
    return size.copysign(ratio).to(torch.float8_e4m3fn).view(torch.uint8), scale


def decode_scaled(codec: str, codes: Tensor, scale: Tensor) -> Tensor:
    """The numbers, float32."""
    return codes.view(torch.int8 if codec == "int8" else torch.float8_e4m3fn).float() * scale[..., None]


def encode_affine(x: Tensor, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Scale and zero (bfloat16, ``dim`` of size 1) and codes (uint8, as ``x``) of float32 ``x`` along ``dim``."""
    low, high = x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)
    zero = _toward(low, -torch.inf)
    scale = _toward((high - zero.float()) / 15, torch.inf)
    broken = ~(low.isfinite() & high.isfinite() & zero.isfinite() & scale.isfinite())
    scale, zero = scale.masked_fill(broken, torch.nan), zero.masked_fill(broken, 0)
    step = torch.where(scale > 0, scale.float(), 1.0)
    codes = ((x - zero.float()) / step).nan_to_num(0.0, 0.0, 0.0).round().clamp(0, 15).to(torch.uint8)
    return scale, zero, codes


def _toward(x: Tensor, end: float) -> Tensor:
    """``x`` rounded to bfloat16 toward ``end``, so that it never moves the other way."""
    near = x.to(torch.bfloat16)
    moved = near.nextafter(torch.full_like(near, end))
    return torch.where((near.float() > x) if end < 0 else (near.float() < x), moved, near)


def pack(codes: Tensor) -> Tensor:
    """Codes uint8 ``(..., size)`` of 0 to 15 in the order of int4 rows: ``(..., packed_bytes(size))``."""
    size = codes.shape[-1]
    whole = packed_bytes(size) * 2
    codes = torch.nn.functional.pad(codes, (0, whole - size))
    parts = []
    for start in range(0, whole, 128):
        part = codes[..., start : start + 128].unflatten(-1, (-1, 2, 16, 2))  # j // 2, j % 2, i, h
        joined = part[..., 0, :, :] | part[..., 1, :, :] << 4
        parts.append(joined.movedim(-3, -1).flatten(-3))
    return torch.cat(parts, -1)


def unpack(packed: Tensor, size: int) -> Tensor:
    """The inverse of ``pack``."""
    parts = []
    for start in range(0, packed.shape[-1], 64):
        part = packed[..., start : start + 64]
        joined = part.unflatten(-1, (16, 2, -1)).movedim(-1, -3)  # j // 2, i, h
        parts.append(torch.stack([joined & 15, joined >> 4], -3).flatten(-4))
    return torch.cat(parts, -1)[..., :size]
