"""StreamingLLM: the first few tokens, which attention uses as a sink, and the newest."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from attnkit.positions import Rotary
from attnkit.state.policies.base import Evicting, Seen


@dataclass(frozen=True)
class StreamingLLM(Evicting):
    """Keeps the first ``sinks`` tokens and the newest ``budget - sinks``.

    With ``rotary``, that by which the keys were turned, positions are those inside the cache, as in the paper: no
    matter how long the text, a sink is never further from the query than the cache is long. Without it they stay those
    of the text.

    Source: Xiao et al. 2023, arXiv 2309.17453, sections 3.2 and 3.3.
    """

    sinks: int = field(default=4, kw_only=True)
    rotary: Rotary | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.sinks < self.budget:
            raise ValueError(f"StreamingLLM: sinks is {self.sinks}, expected 0 to {self.budget - 1}: budget - 1")
        if self.rotary is not None and self.rotary.tables(torch.zeros(1))[0].amax() != 1:
            raise ValueError(
                "StreamingLLM: rotary changes the length of keys (YaRN), expected one that only turns them"
            )

    def score(self, seen: Seen) -> Tensor:
        """The position; sinks stay."""
        return seen.positions.double().masked_fill(seen.positions < self.sinks, torch.inf)

    def turned(self, sinks: Tensor, shift: int) -> Tensor:
        """Keys of the sinks ``(b, g, s, d)`` as if they stood ``shift`` later in the text."""
        assert self.rotary is not None
        return self.rotary.rotate(sinks, torch.full((sinks.shape[2],), shift, device=sinks.device))
