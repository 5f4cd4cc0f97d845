"""The modules that make entries of tokens, and that pick some of them; and rotary for the last channels of a head."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from attnkit.mechanisms.compressed.pooling import choose, compress
from attnkit.positions import Rotary
from attnkit.state import Closed


def linear(inputs: int, outputs: int) -> nn.Linear:
    """A linear map without bias that starts as N(0, 1 / inputs)."""
    made = nn.Linear(inputs, outputs, bias=False)
    nn.init.normal_(made.weight, std=inputs**-0.5)
    return made


def turned(x: Tensor, positions: Tensor, rotary: Rotary | None) -> Tensor:
    """``x`` ``(b, h, n, d)`` with its last channels, as many as ``rotary`` is made for, turned by ``positions``."""
    if rotary is None:
        return x
    still = x.shape[-1] - rotary.head_size
    return torch.cat([x[..., :still], rotary.rotate(x[..., still:], positions)], -1)


class Compressor(nn.Module):
    """Values and gates of tokens, and the entries ``(b, 1, windows, size)`` that whole windows of them become."""

    def __init__(self, width: int, size: int, rate: int, overlap: bool, eps: float) -> None:
        super().__init__()
        self.size, self.rate, self.overlap = size, rate, overlap
        channels = 2 * size if overlap else size
        self.values, self.gates = linear(width, channels), linear(width, channels)
        self.bias = nn.Parameter(torch.zeros(rate, channels))
        self.norm = nn.RMSNorm(size, eps=eps)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Values and gates ``(b, 1, n, channels)`` of tokens ``x`` ``(b, n, width)``."""
        return self.values(x)[:, None], self.gates(x)[:, None]

    def entries(self, closed: Closed, window: int, rotary: Rotary | None) -> Tensor:
        """The entries of whole windows, of which the first is number ``window``; they stand where its tokens begin."""
        pooled = compress(closed.values, closed.gates, self.bias, overlap=self.overlap, before=closed.before)
        positions = torch.arange(window, window + pooled.shape[2], device=pooled.device) * self.rate
        return turned(self.norm(pooled), positions, rotary)


class Indexer(nn.Module):
    """The lightning indexer: entries of its own, small ones, and queries that rank them; no gradient reaches it."""

    def __init__(self, width: int, latent: int, heads: int, size: int, rate: int, eps: float) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.weights = linear(latent, heads * size), linear(width, heads)
        self.keys = Compressor(width, size, rate, True, eps)

    @torch.no_grad()
    def choose(self, x: Tensor, latent: Tensor, keys: Tensor, start: int, rotary: Rotary | None, top: int) -> Tensor:
        """The ``top`` entries of each token ``x`` ``(b, m, width)``, from index keys ``(b, 1, w, c)``: as ``choose``.

        ``latent`` ``(b, m, latent)`` is what queries are made of, and ``start`` the position of the first token.
        """
        length = start + x.shape[1]
        positions = torch.arange(start, length, device=x.device)
        q = turned(self.q(latent).unflatten(-1, (self.heads, -1)).transpose(1, 2), positions, rotary)
        weights = self.weights(x).transpose(1, 2)
        return choose(q, keys[:, 0], weights, rate=self.keys.rate, top=top, length=length)
