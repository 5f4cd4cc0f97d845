"""The layer: projections, the learned share, rotary on both halves, the norm of each head, and a plain cache."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from attnkit.costs import differential as cost
from attnkit.masks import Mask, causal
from attnkit.mechanisms.differential import differential_attention
from attnkit.positions import Rotary
from attnkit.projected import MaskedAttention
from attnkit.shapes import check_groups
from attnkit.spec import Cost, Sizes


def initial_share(layer: int) -> float:
    """The paper's lambda_init of layer ``layer``, counted from 0: 0.2 in the first, towards 0.8 in deep ones."""
    return 0.8 - 0.6 * math.exp(-0.3 * layer)


@dataclass(frozen=True)
class DifferentialConfig:
    """A differential attention layer.

    ``heads`` are pairs: each has two halves of ``width / heads / 2`` channels in queries and keys, and as many channels
    as both in its values. ``kv_heads`` None is one KV head a query head. ``initial_share`` depends on the place of the
    layer, see the function of that name. ``rotary`` is made for one half, ``qk_norm`` normalises each half of queries
    and keys. ``weighted_norm`` gives the norm of the heads' results a learned weight that they share, as the authors'
    code has it; Hugging Face's has none. ``mask`` None is bidirectional.
    """

    width: int
    heads: int
    kv_heads: int | None = None
    initial_share: float = 0.2
    rotary: Rotary | None = None
    qk_norm: bool = False
    weighted_norm: bool = False
    eps: float = 1e-5
    mask: Mask | None = field(default_factory=causal)
    backend: str | None = None

    def __post_init__(self) -> None:
        if self.heads < 1 or self.width < 1 or self.width % (2 * self.heads):
            raise ValueError(
                f"DifferentialConfig: got width {self.width} and {self.heads} heads, expected a width that twice the "
                f"heads divide"
            )
        check_groups("DifferentialConfig", self.heads, self.groups)
        if not 0 <= self.initial_share < 1:
            raise ValueError(f"DifferentialConfig: initial_share is {self.initial_share}, expected 0 <= share < 1")
        if self.rotary is not None and self.rotary.head_size != self.half:
            raise ValueError(
                f"DifferentialConfig: rotary is made for head size {self.rotary.head_size}, halves have {self.half}"
            )

    @property
    def groups(self) -> int:
        return self.heads if self.kv_heads is None else self.kv_heads

    @property
    def head_size(self) -> int:
        return self.width // self.heads

    @property
    def half(self) -> int:
        return self.head_size // 2


class DifferentialAttention(MaskedAttention):
    """Differential attention on ``(b, n, width)``; ``forward`` for whole sequences, ``step`` through a state.

    The share is ``exp(q1 . k1) - exp(q2 . k2) + initial_share`` of four vectors that all heads have in common. They
    start as N(0, 0.1^2), so that it starts near ``initial_share``, projections as N(0, 1/width).
    """

    config: DifferentialConfig

    def __init__(self, config: DifferentialConfig) -> None:
        c = config
        super().__init__(c.width, c.heads, c.groups, c.head_size, rotary=c.rotary, qk_norm=c.qk_norm, norm_size=c.half)
        self.config = c
        self.share_q1, self.share_k1, self.share_q2, self.share_k2 = (
            nn.Parameter(0.1 * torch.randn(c.half)) for _ in range(4)
        )
        self.o_norm = nn.RMSNorm(c.head_size, eps=c.eps, elementwise_affine=c.weighted_norm)

    @property
    def share(self) -> Tensor:
        """How much of the second attention is taken off, a number, in float32 at least."""
        work = torch.promote_types(self.share_q1.dtype, torch.float32)
        one, two = self.share_q1.to(work) @ self.share_k1.to(work), self.share_q2.to(work) @ self.share_k2.to(work)
        return one.exp() - two.exp() + self.config.initial_share

    def cost(self, m: int, n: int, *, batch: int = 1, dtype: torch.dtype = torch.float32) -> Cost:
        """What the attention of ``m`` new tokens over ``n`` takes, and the state that holds ``n``."""
        c = self.config
        return cost(Sizes(batch, c.heads, c.groups, m, n, c.half, c.head_size), mask=c.mask, itemsize=dtype.itemsize)

    def _placed(self, norm: nn.Module, y: Tensor, positions: Tensor) -> Tensor:
        """``y`` ``(b, h, n, 2 d)`` with each half normed and turned on its own."""
        placed = super()._placed
        return torch.cat([placed(norm, half, positions) for half in y.chunk(2, -1)], -1)

    def _attend(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Mask | None) -> Tensor:
        c = self.config
        o = differential_attention(q, k, v, self.share.expand(c.heads), mask=mask, backend=c.backend)
        normed: Tensor = (1 - c.initial_share) * self.o_norm(o)
        return normed
