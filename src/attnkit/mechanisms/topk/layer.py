"""The layer: projections, head norms, positions and a decoding state around ``topk_attention``."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from attnkit.masks import Mask, causal
from attnkit.mechanisms.topk import cost, topk_attention
from attnkit.mechanisms.topk.counts import check
from attnkit.positions import Rotary
from attnkit.projected import Heads, MaskedAttention, check_rotary
from attnkit.spec import Cost, Sizes


@dataclass(frozen=True)
class TopKConfig(Heads):
    """A top-k attention layer: ``top`` keys a query, or the share ``density`` of those that it may see.

    ``kv_heads`` None is one KV head a query head. ``mask`` None is bidirectional.
    """

    top: int | None = None
    density: float | None = None
    mask: Mask | None = field(default_factory=causal)
    rotary: Rotary | None = None
    qk_norm: bool = False
    backend: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check("TopKConfig", self.top, self.density)
        check_rotary("TopKConfig", self.rotary, self.head_size)


class TopKAttention(MaskedAttention):
    """Top-k attention on ``(b, n, width)``; ``forward`` for whole sequences, ``step`` for decoding through a state.

    Projections start as N(0, 1/width), so that scores start at unit scale. Any key may be among the best of a
    later query, so the state keeps all.
    """

    config: TopKConfig

    def __init__(self, config: TopKConfig) -> None:
        c = config
        super().__init__(c.width, c.heads, c.groups, c.head_size, rotary=c.rotary, qk_norm=c.qk_norm)
        self.config = c

    def cost(self, m: int, n: int, *, batch: int = 1, dtype: torch.dtype = torch.float32) -> Cost:
        """What the attention of ``m`` new tokens over ``n`` takes, and the state that holds ``n``."""
        c = self.config
        sizes = Sizes(batch, c.heads, c.groups, m, n, c.head_size, c.head_size)
        return cost(sizes, top=c.top, density=c.density, mask=c.mask, itemsize=dtype.itemsize)

    def _attend(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Mask | None) -> Tensor:
        c = self.config
        o: Tensor = topk_attention(q, k, v, top=c.top, density=c.density, mask=mask, backend=c.backend)
        return o
