"""Linear attention of every kind: a state of fixed size, whatever the length."""

from __future__ import annotations

from attnkit.spec import Cost, Sizes

# A chunk's own work is CHUNK numbers a token beside d for the state, and a state is kept for each: 64 is both.
CHUNK = 64
# Decays of every channel need s x s x d numbers for pairs of tokens: only within tiles this small. Of 4, 8, 16 tokens 8
# were fastest on one core of an AMD EPYC, with heads of 64.
TILE = 8
# Tables of the delta rule cost a token as many numbers, its states d * e over it: at the head sizes in use, 64 balances
# the two.
DELTA_BLOCK = 64


def delta(sizes: Sizes, *, tail: int = 0, itemsize: int = 4) -> Cost:
    """Cost of ``m`` tokens after any number of others; the state is ``h * d * e`` float32 numbers.

    ``tail`` is the numbers that a layer's convolution keeps, of ``itemsize`` bytes.
    """
    s = sizes
    state = s.h * s.d * s.e
    tables = 0 if s.m == 1 else 2 * min(s.m, DELTA_BLOCK) * (s.d + s.e)
    token = s.h * (s.d + 2 * s.e) + s.g * s.d + 2 * s.h
    return Cost(
        flops=s.b * s.m * (6 * state + s.h * tables),
        bytes=s.b * (s.m * token * itemsize + 2 * 4 * state),
        state_bytes_per_token=0,
        state_bytes_fixed=4 * state + tail * itemsize,
    )


def retention(sizes: Sizes, *, itemsize: int = 4) -> Cost:
    """Cost of one call; the state is d x e float32 numbers a query head, at any length."""
    s = sizes
    inside = s.h * s.m * min(s.n, CHUNK) * (s.d + s.e) if s.m > 1 else 0
    state = 4 * s.h * s.d * s.e
    return Cost(
        flops=s.b * (4 * s.h * s.m * s.d * s.e + inside),
        bytes=s.b * ((s.h + s.g) * s.m * (s.d + s.e) * itemsize + 2 * state),
        state_bytes_per_token=0,
        state_bytes_fixed=state,
    )


def gla(sizes: Sizes, *, tail: int = 0, itemsize: int = 4) -> Cost:
    """Cost of one call with a gate a channel; the state is d x e float32 numbers a KV head, at any length.

    ``tail`` is the numbers that a layer's convolution keeps, of ``itemsize`` bytes.
    """
    s = sizes
    # Pairs of a tile multiply a gate as well; a chunk's other pairs have it in their factors.
    inside = s.h * s.m * (min(s.n, CHUNK) * (s.d + s.e) + min(s.n, TILE) * s.d) if s.m > 1 else 0
    state = 4 * s.g * s.d * s.e
    return Cost(
        flops=s.b * (2 * (s.h + s.g) * s.m * s.d * s.e + inside),
        bytes=s.b * (s.h * s.m * (s.d + s.e) * itemsize + s.g * s.m * (s.d + s.e) * itemsize + 4 * s.g * s.m * s.d)
        + 2 * s.b * state,
        state_bytes_per_token=0,
        state_bytes_fixed=state + tail * itemsize,
    )


def convolution(sizes: Sizes, *, tail: int = 0, itemsize: int = 4) -> Cost:
    """Cost of a layer that has a short convolution of ``d`` channels and no attention; ``tail`` is what it keeps."""
    s = sizes
    taps = tail // s.d + 1
    return Cost(
        flops=2 * s.b * s.m * s.d * taps,
        bytes=s.b * (2 * s.m * s.d + 2 * tail) * itemsize,
        state_bytes_per_token=0,
        state_bytes_fixed=tail * itemsize,
    )
