"""The layer: projections, head norms, positions and a decoding state around ``entmax_attention``."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from attnkit.masks import Mask, causal
from attnkit.mechanisms.entmax import check_alpha, cost, entmax_attention
from attnkit.positions import Rotary
from attnkit.shapes import check_groups
from attnkit.spec import Cost, Sizes
from attnkit.state import KVState


@dataclass(frozen=True)
class EntmaxConfig:
    """An entmax attention layer; ``alpha`` is 1.5, or 2 for sparsemax.

    ``kv_heads`` None is one KV head a query head. ``mask`` None is bidirectional.
    """

    width: int
    heads: int
    kv_heads: int | None = None
    alpha: float = 1.5
    mask: Mask | None = field(default_factory=causal)
    rotary: Rotary | None = None
    qk_norm: bool = False
    backend: str | None = None

    def __post_init__(self) -> None:
        if self.heads < 1 or self.width < 1 or self.width % self.heads:
            raise ValueError(
                f"EntmaxConfig: got width {self.width} and {self.heads} heads, expected a width that heads divide"
            )
        check_groups("EntmaxConfig", self.heads, self.groups)
        check_alpha("EntmaxConfig", self.alpha)
        if self.rotary is not None and self.rotary.head_size != self.head_size:
            raise ValueError(
                f"EntmaxConfig: rotary is made for head size {self.rotary.head_size}, heads have {self.head_size}"
            )

    @property
    def groups(self) -> int:
        return self.heads if self.kv_heads is None else self.kv_heads

    @property
    def head_size(self) -> int:
        return self.width // self.heads


class EntmaxAttention(nn.Module):
    """Entmax attention on ``(b, n, width)``; ``forward`` for whole sequences, ``step`` for decoding through a state.

    Projections start as N(0, 1/width), so that scores start at unit scale.
    """

    def __init__(self, config: EntmaxConfig) -> None:
        super().__init__()
        self.config = c = config
        self.q = nn.Linear(c.width, c.width, bias=False)
        self.k, self.v = (nn.Linear(c.width, c.groups * c.head_size, bias=False) for _ in range(2))
        self.o = nn.Linear(c.width, c.width, bias=False)
        for linear in (self.q, self.k, self.v, self.o):
            nn.init.normal_(linear.weight, std=c.width**-0.5)
        self.q_norm, self.k_norm = (nn.RMSNorm(c.head_size) if c.qk_norm else nn.Identity() for _ in range(2))

    def forward(self, x: Tensor, *, mask: Mask | None = None) -> Tensor:
        """Attend within ``x`` ``(b, n, width)``; returns the same shape.

        ``mask`` joins the layer's own, for what belongs to the batch: padding, documents.
        """
        own = self.config.mask
        joined = own & mask if own is not None and mask is not None else own or mask
        return self._attend(*self._project(x, 0), joined)

    def state(
        self,
        batch: int,
        capacity: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> KVState:
        """An empty state for ``capacity`` tokens: a key without weight now may have some for a later query."""
        c = self.config
        if c.mask is None:
            raise ValueError("a bidirectional layer cannot decode: give it a causal mask")
        return KVState(batch, c.groups, capacity, c.head_size, dtype=dtype, device=device)

    def step(self, x: Tensor, state: KVState) -> tuple[Tensor, KVState]:
        """Feed the next token or tokens ``x`` ``(b, m, width)``; any split of a sequence gives ``forward``'s rows."""
        q, k, v = self._project(x, state.length)
        view, mask = state.append(k, v).for_queries(self.config.mask, x.shape[1])
        return self._attend(q, view.k, view.v, mask), state

    def cost(self, m: int, n: int, *, batch: int = 1, dtype: torch.dtype = torch.float32) -> Cost:
        """What the attention of ``m`` new tokens over ``n`` takes, and the state that holds ``n``."""
        c = self.config
        sizes = Sizes(batch, c.heads, c.groups, m, n, c.head_size, c.head_size)
        return cost(sizes, mask=c.mask, itemsize=dtype.itemsize)

    def _project(self, x: Tensor, start: int) -> tuple[Tensor, Tensor, Tensor]:
        size = self.config.head_size
        q, k, v = (y(x).unflatten(-1, (-1, size)).transpose(1, 2) for y in (self.q, self.k, self.v))
        q, k = self.q_norm(q), self.k_norm(k)
        if self.config.rotary is not None:
            positions = torch.arange(start, start + x.shape[1], device=x.device)
            q, k = self.config.rotary.rotate(q, positions), self.config.rotary.rotate(k, positions)
        return q, k, v

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask | None) -> Tensor:
        c = self.config
        o = entmax_attention(q, k, v, alpha=c.alpha, mask=mask, backend=c.backend)
        y: Tensor = self.o(o.transpose(1, 2).flatten(2))
        return y
