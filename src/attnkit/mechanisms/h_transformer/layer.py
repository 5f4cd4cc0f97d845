"""The layer: projections, rotary positions and a decoding state around ``h_transformer_attention``."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attnkit.mechanisms.h_transformer import cost, h_transformer_attention, h_transformer_attention_step
from attnkit.positions import Rotary
from attnkit.projected import Heads, Projected, check_rotary
from attnkit.spec import Cost, Sizes
from attnkit.state import SummaryState


@dataclass(frozen=True)
class HTransformerConfig(Heads):
    """An H-Transformer-1D layer; ``block`` is how many tokens a block of the finest level has.

    Rotary positions are turned in before keys are averaged, so that a mean keeps what turns slowly. ``kv_heads`` None
    is one KV head a query head; ``qk_norm`` normalises queries and keys.
    """

    block: int = 16
    causal: bool = True
    rotary: Rotary | None = None
    qk_norm: bool = False
    backend: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block < 1:
            raise ValueError(f"HTransformerConfig: block is {self.block}, expected at least 1")
        check_rotary("HTransformerConfig", self.rotary, self.head_size)


class HTransformerAttention(Projected):
    """H-Transformer-1D on ``(b, n, width)``; ``forward`` for whole sequences, ``step`` for decoding through a state.

    Projections start as N(0, 1/width).
    """

    def __init__(self, config: HTransformerConfig) -> None:
        c = config
        super().__init__(c.width, c.heads, c.groups, c.head_size, rotary=c.rotary, qk_norm=c.qk_norm)
        self.config = c

    def forward(self, x: Tensor, *, lengths: Tensor | None = None) -> Tensor:
        """Attend within ``x`` ``(b, n, width)``, true ``lengths`` ``(b,)`` if not causal; returns the same shape."""
        c = self.config
        q, k, v = self._project(x, 0)
        o = h_transformer_attention(q, k, v, block=c.block, causal=c.causal, lengths=lengths, backend=c.backend)
        return self._out(o)

    def state(
        self,
        batch: int,
        capacity: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> SummaryState:
        """An empty state for ``capacity`` tokens: the last up to ``2 block`` ones, and sums of those before."""
        c = self.config
        if not c.causal:
            raise ValueError("a bidirectional layer cannot decode: give it causal=True")
        sizes = (c.head_size, c.head_size)
        return SummaryState(batch, c.groups, capacity, *sizes, block=c.block, dtype=dtype, device=device)

    def step(self, x: Tensor, state: SummaryState) -> tuple[Tensor, SummaryState]:
        """Feed the next token or tokens ``x`` ``(b, m, width)``; any split of a sequence gives ``forward``'s rows."""
        sizes, rows = state.pieces(x.shape[1]), []
        for q, k, v in zip(*(y.split(sizes, 2) for y in self._project(x, state.length)), strict=True):
            seen, counts = state.append(k, v)
            rows.append(h_transformer_attention_step(q, seen.k, seen.v, counts))
        return self._out(torch.cat(rows, 2)), state

    def cost(self, m: int, n: int, *, batch: int = 1, dtype: torch.dtype = torch.float32) -> Cost:
        """What the attention of ``m`` new tokens over ``n`` takes, and the state that holds ``n``."""
        c = self.config
        sizes = Sizes(batch, c.heads, c.groups, m, n, c.head_size, c.head_size)
        return cost(sizes, block=c.block, causal=c.causal, itemsize=dtype.itemsize)
