"""The layer: projections, head norms, positions and a decoding state around ``entmax_attention``."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from attnkit.masks import Mask, causal
from attnkit.mechanisms.entmax import check_alpha, cost, entmax_attention
from attnkit.positions import Rotary
from attnkit.projected import Heads, MaskedAttention, check_rotary
from attnkit.spec import Cost, Sizes


@dataclass(frozen=True)
class EntmaxConfig(Heads):
    """An entmax attention layer; ``alpha`` is 1.5, or 2 for sparsemax.

    ``kv_heads`` None is one KV head a query head. ``mask`` None is bidirectional.
    """

    alpha: float = 1.5
    mask: Mask | None = field(default_factory=causal)
    rotary: Rotary | None = None
    qk_norm: bool = False
    backend: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_alpha("EntmaxConfig", self.alpha)
        check_rotary("EntmaxConfig", self.rotary, self.head_size)


class EntmaxAttention(MaskedAttention):
    """Entmax attention on ``(b, n, width)``; ``forward`` for whole sequences, ``step`` for decoding through a state.

    Projections start as N(0, 1/width), so that scores start at unit scale. A key without weight now may have
    some for a later query, so the state keeps all.
    """

    config: EntmaxConfig

    def __init__(self, config: EntmaxConfig) -> None:
        c = config
        super().__init__(c.width, c.heads, c.groups, c.head_size, rotary=c.rotary, qk_norm=c.qk_norm)
        self.config = c

    def cost(self, m: int, n: int, *, batch: int = 1, dtype: torch.dtype = torch.float32) -> Cost:
        """What the attention of ``m`` new tokens over ``n`` takes, and the state that holds ``n``."""
        c = self.config
        sizes = Sizes(batch, c.heads, c.groups, m, n, c.head_size, c.head_size)
        return cost(sizes, mask=c.mask, itemsize=dtype.itemsize)

    def _attend(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Mask | None) -> Tensor:
        c = self.config
        o: Tensor = entmax_attention(q, k, v, alpha=c.alpha, mask=mask, backend=c.backend)
        return o
