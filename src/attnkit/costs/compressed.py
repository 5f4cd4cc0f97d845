"""Attention to a window, and to entries pooled from windows of tokens (CSA, HCA)."""

from __future__ import annotations

from attnkit.spec import Cost, Sizes


def compressed(
    sizes: Sizes,
    *,
    window: int = 128,
    rate: int | None = 128,
    top: int | None = None,
    overlap: bool = False,
    index: tuple[int, int] | None = None,
    itemsize: int = 4,
) -> Cost:
    """Cost of one call, and of the state of a layer that makes its entries from tokens.

    ``index`` is the number of index heads and their size, ``top`` what a query picks by them; ``overlap`` says that
    tokens have two series. Without ``rate`` there is the window alone.
    """
    s = sizes
    first, last = s.n - s.m, s.n
    near = _sum_of_least(first, last, window)
    far = ranked = 0
    token, fixed = 0, min(window - 1, s.n) * s.d * s.g * itemsize
    if rate is not None:
        ranked = _windows_up_to(last, rate) - _windows_up_to(first, rate)
        far = ranked if top is None else ranked - _over(first, last, rate, top)
        kept = s.g * s.d + (index[1] if index else 0)
        token = kept * itemsize // rate
        # Values and gates of the tokens that wait, of two series each where windows overlap; then the last series a.
        waiting = (2 if overlap else 1) * min(rate - 1, s.n) + (rate if overlap else 0)
        fixed += kept * itemsize * (s.n // rate + 2 * waiting) - token * s.n
    entries = 0 if rate is None else s.n // rate
    heads, size = index or (0, 0)
    # All index keys are read, and the entries that queries pick by them.
    vectors = min(s.n, window - 1 + s.m) + (entries if top is None else min(entries, s.m * top))
    return Cost(
        flops=4 * s.b * s.h * s.d * (near + far) + 2 * s.b * heads * size * ranked,
        bytes=s.b * (2 * s.h * s.m * s.d + s.g * vectors * s.d + entries * size) * itemsize,
        state_bytes_per_token=token,
        state_bytes_fixed=fixed,
    )


def _sum_of_least(first: int, last: int, most: int) -> int:
    """The sum of ``min(t + 1, most)`` for positions ``t`` from ``first`` up to ``last``."""
    below = [min(edge, most) for edge in (first, last)]
    sums = [edge * (edge + 1) // 2 + (end - edge) * most for edge, end in zip(below, (first, last), strict=True)]
    return sums[1] - sums[0]


def _windows_up_to(last: int, rate: int) -> int:
    """The sum of ``(t + 1) // rate`` for positions ``t`` below ``last``."""
    whole, rest = divmod(last, rate)
    return rate * whole * (whole - 1) // 2 + whole * (rest + 1)


def _over(first: int, last: int, rate: int, top: int) -> int:
    """By how much ``(t + 1) // rate`` is more than ``top``, summed over positions ``t``."""
    return sum(_windows_up_to(max(0, end - top * rate), rate) * sign for end, sign in ((last, 1), (first, -1)))
