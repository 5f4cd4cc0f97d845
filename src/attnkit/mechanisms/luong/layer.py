"""The layer: the paper's attentional state, a decoder's state joined with what it attended to."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from attnkit.mechanisms.luong import luong_attention


@dataclass(frozen=True)
class LuongConfig:
    """A layer of Luong attention with one head.

    ``context`` is the width of the source's states, ``width`` when None. ``max_length`` is the longest source that
    location scores know. ``local`` None is global, "m" monotonic, "p" predictive, within ``radius``.
    """

    width: int
    context: int | None = None
    score: str = "general"
    local: str | None = None
    radius: int = 10
    max_length: int | None = None
    backend: str | None = None

    def __post_init__(self) -> None:
        if self.width < 1 or self.source < 1:
            raise ValueError(f"LuongConfig: width is {self.width} and context {self.source}, expected at least 1 each")
        if self.score == "dot" and self.source != self.width:
            raise ValueError(
                f"LuongConfig: width is {self.width} and context {self.source}, expected one for dot: take general"
            )
        if (self.score == "location") != (self.max_length is not None):
            raise ValueError(
                f"LuongConfig: score is {self.score!r} and max_length {self.max_length}, expected max_length with "
                f"location scores and only with them"
            )

    @property
    def source(self) -> int:
        return self.width if self.context is None else self.context


class LuongAttention(nn.Module):
    """``tanh(W_c [context; state])`` for each decoder state; weights start uniform in [-0.1, 0.1], as in the paper."""

    def __init__(self, config: LuongConfig) -> None:
        super().__init__()
        self.config = c = config
        shape = {
            "general": (1, c.width, c.source),
            "concat": (1, c.width, c.width + c.source),
            "location": (1, c.max_length or 0, c.width),
        }.get(c.score)
        self.weight = None if shape is None else nn.Parameter(torch.empty(shape))
        self.vector = nn.Parameter(torch.empty(1, c.width)) if c.score == "concat" else None
        self.place_weight = nn.Parameter(torch.empty(1, c.width, c.width)) if c.local == "p" else None
        self.place_vector = nn.Parameter(torch.empty(1, c.width)) if c.local == "p" else None
        self.o = nn.Linear(c.source + c.width, c.width, bias=False)
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -0.1, 0.1)

    def forward(self, x: Tensor, context: Tensor, *, lengths: Tensor | None = None, start: int = 0) -> Tensor:
        """Attentional states ``(b, m, width)`` of decoder states ``x`` ``(b, m, width)`` over ``(b, n, context)``.

        ``lengths`` ``(b,)`` are the true lengths of the sources, ``start`` the position of the first of ``x``.
        """
        found = self._attend(x, context, context, lengths, start)
        y: Tensor = torch.tanh(self.o(torch.cat([found, x], -1)))
        return y

    def weights(self, x: Tensor, context: Tensor, *, lengths: Tensor | None = None, start: int = 0) -> Tensor:
        """How much each state of ``x`` takes from each position of ``context``: ``(b, m, n)``."""
        eye = torch.eye(context.shape[1], dtype=x.dtype, device=x.device).expand(len(x), -1, -1)
        return self._attend(x, context, eye, lengths, start)

    def _attend(self, x: Tensor, context: Tensor, values: Tensor, lengths: Tensor | None, start: int) -> Tensor:
        c = self.config
        return luong_attention(
            x[:, None],
            context[:, None],
            values[:, None],
            self.weight,
            self.vector,
            self.place_weight,
            self.place_vector,
            score=c.score,
            local=c.local,
            radius=c.radius,
            start=start,
            lengths=lengths,
            backend=c.backend,
        )[:, 0]
