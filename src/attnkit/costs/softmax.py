"""Softmax attention over keys and values of every token, of a window, or quantised."""

from __future__ import annotations

from typing import Protocol

from attnkit.spec import Cost, Sizes

GROUP = 32
"""Tokens of a group of int4 keys, and channels of a group of int4 values."""


class Reached(Protocol):
    """What a state keeps: the last ``window`` tokens and the first ``sinks``."""

    @property
    def window(self) -> int: ...

    @property
    def sinks(self) -> int: ...


class Seen(Protocol):
    """What a cost asks of a mask: an ``attnkit.Mask``, or a ``Band`` where there are only numbers."""

    @property
    def batches(self) -> int: ...

    @property
    def heads(self) -> int: ...

    def visible_pairs(self, m: int, n: int) -> int: ...

    def reach(self) -> Reached | None: ...


def softmax(sizes: Sizes, *, mask: Seen | None = None, codec: str | None = None, itemsize: int = 4) -> Cost:
    """Cost of one call; a mask that lets go of old keys (a window) needs a fixed state instead of a growing one.

    ``codec`` is how the state keeps keys and values, see ``attnkit.state.codec``; a window keeps numbers as they are.
    """
    s = sizes
    share = s.m * s.n if mask is None else mask.visible_pairs(s.m, s.n) / (mask.batches * mask.heads)
    token = s.g * (s.d + s.e) * itemsize
    reach = mask.reach() if mask is not None else None
    if reach and reach.window + reach.sinks >= s.n:
        reach = None  # nothing to let go of yet: the layer keeps them all, see ``SoftmaxAttention.state``
    seen = s.n if reach is None else min(s.n, reach.window + reach.sinks + s.m - 1)
    growing, fixed = (0, (reach.window + reach.sinks) * token) if reach else (token, 0)
    read = seen * token
    if codec is not None and not reach:
        growing, fixed = _coded(codec, s, itemsize)
        read = growing * s.n
    return Cost(
        flops=int(2 * s.b * s.h * share * (s.d + s.e)),
        bytes=s.b * (s.h * s.m * (s.d + s.e) * itemsize + read),
        state_bytes_per_token=growing,
        state_bytes_fixed=fixed,
    )


def _coded(codec: str, s: Sizes, itemsize: int) -> tuple[int, int]:
    """Bytes of a quantised token, and what a state of ``n`` tokens has beside those of its tokens."""
    if codec != "int4":
        return s.g * (s.d + s.e + 2 * 4), 0
    values = packed_bytes(s.e) + 2 * 2 * -(-s.e // GROUP)
    # Keys have a scale and a zero a channel and group; a group more than can be full, and a ring of two as numbers.
    whole = (s.n // GROUP + 1) * (GROUP * packed_bytes(s.d) + 2 * 2 * s.d)
    token = values + packed_bytes(s.d) + 2 * 2 * s.d // GROUP
    return s.g * token, s.g * (whole + values * s.n + 2 * GROUP * s.d * itemsize - token * s.n)


def differential(sizes: Sizes, *, mask: Seen | None = None, itemsize: int = 4) -> Cost:
    """Cost of one call, ``sizes.d`` being the size of one half; a token's state is its two half keys and its value."""
    s = sizes
    pairs = s.m * s.n if mask is None else mask.visible_pairs(s.m, s.n) // (mask.batches * mask.heads)
    token = s.g * (2 * s.d + s.e) * itemsize
    return Cost(
        flops=4 * s.b * s.h * pairs * (s.d + s.e),
        bytes=s.b * (s.h * s.m * (2 * s.d + s.e) * itemsize + s.n * token),
        state_bytes_per_token=token,
        state_bytes_fixed=0,
    )


def packed_bytes(size: int) -> int:
    """Bytes of one token's int4 codes."""
    rest = size % 128
    return size // 128 * 64 + (0 if rest == 0 else 32 if rest <= 64 else 64)
