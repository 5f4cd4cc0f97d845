"""Latent attention (MLA), and the same over tokens that an indexer chooses (DSA)."""

from __future__ import annotations

from attnkit.costs.pairs import interval_pairs
from attnkit.spec import Cost, Sizes


def mla(sizes: Sizes, *, latent: int | None = None, rotary: int | None = None, itemsize: int = 4) -> Cost:
    """Cost of one causal call in the cheaper form; a token's state is its latent and its rotary key, of all heads.

    ``latent`` is four times and ``rotary`` half of the value size when None, which is DeepSeek's choice.
    """
    s = sizes
    c, r = 4 * s.e if latent is None else latent, s.e // 2 if rotary is None else rotary
    pairs, token = interval_pairs(s.m, s.n, None, 0), s.g * (c + r) * itemsize
    maps = s.h * (s.d - r + s.e) * c
    return Cost(
        flops=2 * s.b * min(latent_forms(s, c, r, pairs)),
        bytes=s.b * (s.h * s.m * (s.d + s.e) * itemsize + s.n * token) + maps * itemsize,
        state_bytes_per_token=token,
        state_bytes_fixed=0,
    )


def latent_forms(s: Sizes, c: int, r: int, pairs: int) -> tuple[int, int]:
    """Multiply-adds of a sequence, absorbed and expanded: what a pair takes, and mapping queries or else keys."""
    row = s.h * (s.d - r + s.e) * c
    return s.h * pairs * (2 * c + r) + s.m * row, s.h * pairs * (s.d + s.e) + s.n * row


def dsa(
    sizes: Sizes,
    *,
    top: int = 2048,
    latent: int | None = None,
    rotary: int | None = None,
    index: int = 128,
    index_heads: int = 64,
    itemsize: int = 4,
) -> Cost:
    """Cost of one call; a token's state is that of latent attention and its index key.

    ``latent`` and ``rotary`` are as in the cost of latent attention. Without ``index_heads`` the call takes the choice
    of an earlier layer, and keeps no index key.
    """
    s = sizes
    c, r = 4 * s.e if latent is None else latent, s.e // 2 if rotary is None else rotary
    index = index if index_heads else 0
    pairs = interval_pairs(s.m, s.n, None, 0)
    hidden = interval_pairs(s.m, s.n - top, None, 0) if s.n > top else 0
    attention = mla(s, latent=c, rotary=r, itemsize=itemsize)
    absorbed = 2 * s.b * s.h * ((pairs - hidden) * (2 * c + r) + s.m * (s.d - r + s.e) * c)
    # A query reads the latents that were picked for it, and all index keys.
    unread = max(0, s.n - s.m * top) * s.g * (c + r)
    return Cost(
        flops=2 * s.b * pairs * index_heads * (index + 1) + min(attention.flops, absorbed),
        bytes=attention.bytes + s.b * ((s.n + s.m * index_heads) * index - unread) * itemsize,
        state_bytes_per_token=attention.state_bytes_per_token + index * itemsize,
        state_bytes_fixed=0,
    )
