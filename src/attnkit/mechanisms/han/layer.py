"""The layers: one level of pooling, and both levels of the paper's document encoder."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from attnkit.mechanisms.han import han_attention


@dataclass(frozen=True)
class HanConfig:
    """Pooling of states of ``width``; ``hidden`` is the size of the scoring network, ``width`` when None."""

    width: int
    hidden: int | None = None
    backend: str | None = None

    def __post_init__(self) -> None:
        if min(self.width, self.size) < 1:
            raise ValueError(f"HanConfig: width is {self.width} and hidden {self.size}, expected at least 1 each")

    @property
    def size(self) -> int:
        return self.width if self.hidden is None else self.hidden


class HanAttention(nn.Module):
    """One level: words into sentences. Starts as N(0, 1/inputs), so that scores start at unit scale; the bias as 0."""

    def __init__(self, config: HanConfig) -> None:
        super().__init__()
        self.config = c = config
        self.score = nn.Linear(c.width, c.size)
        self.vector = nn.Parameter(torch.randn(c.size) * c.size**-0.5)
        nn.init.normal_(self.score.weight, std=c.width**-0.5)
        nn.init.zeros_(self.score.bias)

    def forward(self, x: Tensor, ids: Tensor, *, sentences: int) -> Tensor:
        """Sentences ``(b, sentences, width)`` of words ``x`` ``(b, n, width)``, word ``j`` in ``ids[:, j]``."""
        return han_attention(x, *self._weights(), ids, sentences=sentences, backend=self.config.backend)

    def weights(self, x: Tensor, ids: Tensor, *, sentences: int) -> Tensor:
        """How much each word counts within its sentence: ``(b, n)``, 0 for words of none."""
        inside = (ids >= 0) & (ids < sentences)
        words = x.masked_fill(~inside[..., None], 0)
        scores = torch.tanh(self.score(words)) @ self.vector
        table = (ids[:, None] == torch.arange(sentences, device=x.device)[:, None]) & inside[:, None]
        shares = torch.where(table, scores[:, None], torch.finfo(x.dtype).min).softmax(-1)
        return torch.where(table, shares, 0.0).sum(1)

    def _weights(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.score.weight, self.score.bias, self.vector


class HanDocument(nn.Module):
    """Both levels: states of words to vectors of sentences, ``between`` over these, and one vector for the document.

    ``between`` maps ``(b, sentences, width)`` to the same shape, as the paper's bidirectional GRU over sentences does;
    None leaves them as they are. The states of words come from an encoder of the caller's.
    """

    def __init__(self, config: HanConfig, between: nn.Module | None = None) -> None:
        super().__init__()
        self.words, self.sentences = HanAttention(config), HanAttention(config)
        self.between = nn.Identity() if between is None else between

    def forward(self, x: Tensor, ids: Tensor, *, sentences: int) -> Tensor:
        """Documents ``(b, width)`` of words ``x`` ``(b, n, width)``; sentences without words do not count."""
        pooled = self.between(self.words(x, ids, sentences=sentences))
        inside = (ids >= 0) & (ids < sentences)
        held = torch.zeros(len(x), sentences + 1, dtype=torch.bool, device=x.device)
        there = held.scatter(1, torch.where(inside, ids, sentences), True)[:, :sentences]
        document: Tensor = self.sentences(pooled, there.long() - 1, sentences=1)[:, 0]
        return document
