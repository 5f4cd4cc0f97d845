"""Pseudo tokens: how heads make them, where they stand, and which of them see each other.

The pseudo tokens of a token stand side by side: number ``i`` of the ``p`` of token ``t`` is at position ``t p + i``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from attnkit.masks import Mask
from attnkit.masks import causal as earlier
from attnkit.masks import window as last
from attnkit.masks.algebra import Tiles
from attnkit.masks.patterns import chunk_of
from attnkit.positions import Rotary

Order = Literal["flat", "token"]


def pseudo_tokens(x: Tensor, mix: Tensor, *, rotary: Rotary | None = None, start: int = 0) -> Tensor:
    """Pseudo tokens of ``x``, interleaved and then turned by their own positions.

    Parameters
    ----------
    x: (b, h, n, d), queries, keys or values of ``n`` tokens in a row.
    mix: (h, h, p), any floating dtype: what each head (first axis) gives to number ``i`` of each head (second).
    rotary: turns queries and keys after the mixture; None for values.
    start: position of the first token.

    Returns
    -------
    (b, h, n * p, d), in float32 at least: it is an intermediate result.
    """
    work = torch.promote_types(x.dtype, torch.float32)
    # Sequence by sequence: one product over the whole batch would round the gradient of the mixture worse.
    shares = mix.to(work).flatten(1).T.expand(x.shape[0], -1, -1)
    mixed = torch.bmm(shares, x.to(work).flatten(2)).view(x.shape[0], *mix.shape[1:], *x.shape[2:])
    mixed = mixed.transpose(2, 3).flatten(2, 3)
    if rotary is not None:
        mixed = rotary.rotate(mixed, torch.arange(mixed.shape[2], device=x.device) + start * mix.shape[2])
    return mixed


@dataclass(frozen=True, repr=False)
class OfTokens(Mask):
    """``inner``, a mask of tokens, asked about positions of which ``pseudo`` in a row are one token."""

    inner: Mask
    pseudo: int

    def visible(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return self.inner.visible(b, h, chunk_of(q, self.pseudo), chunk_of(k, self.pseudo))

    def tiles(self, t: Tiles) -> tuple[Tensor, Tensor]:
        return self.inner.tiles(Tiles(*(chunk_of(x, self.pseudo) for x in t)))

    def extent(self) -> int:
        return self.inner.extent() * self.pseudo

    def __repr__(self) -> str:
        return f"OfTokens({self.inner!r}, {self.pseudo})"


def visibility(order: Order | None, window: int | None, pseudo: int) -> Mask | None:
    """Who sees whom among positions of pseudo tokens; None when all see all."""
    if order is None:
        return None
    tokens = earlier() if window is None else last(window)
    if pseudo == 1:
        return tokens
    if order == "token":
        return OfTokens(tokens, pseudo)
    return earlier() if window is None else OfTokens(tokens, pseudo) & earlier()


def check_order(where: str, order: str | None, window: int | None) -> None:
    """Raise ``ValueError`` unless ``causal`` is one of those there are and fits the window."""
    if order not in ("flat", "token", None):
        raise ValueError(f"{where}: causal is {order!r}, expected 'flat', 'token' or None (bidirectional)")
    if window is None:
        return
    if window < 1:
        raise ValueError(f"{where}: window is {window}, expected at least 1, the query's own token")
    if order is None:
        raise ValueError(
            f"{where}: window is {window} and causal None, but a window ends at the query's token: say causal='flat' "
            f"or causal='token', or drop the window"
        )
