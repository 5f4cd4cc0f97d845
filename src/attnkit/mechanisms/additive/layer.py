"""The layer: projections, the scoring network and a decoding state around ``additive_attention``."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from attnkit.masks import Mask, causal, joined
from attnkit.mechanisms.additive import additive_attention, cost
from attnkit.spec import Cost, Sizes
from attnkit.state import KVState


@dataclass(frozen=True)
class AdditiveConfig:
    """An additive attention layer.

    ``hidden`` is the width of each head's scoring network, ``width // heads`` when None. ``mask`` None is
    bidirectional. ``normalised`` scores with a unit vector times a learned gain. There are no positions: rotating a
    query and a key says nothing of their distance once they are added.
    """

    width: int
    heads: int
    hidden: int | None = None
    normalised: bool = False
    mask: Mask | None = field(default_factory=causal)
    backend: str | None = None

    def __post_init__(self) -> None:
        if self.heads < 1 or self.width < 1 or self.width % self.heads:
            raise ValueError(
                f"AdditiveConfig: got width {self.width} and {self.heads} heads, expected a width that heads divide"
            )
        if self.hidden is not None and self.hidden < 1:
            raise ValueError(f"AdditiveConfig: hidden is {self.hidden}, expected at least 1 or None")

    @property
    def head_size(self) -> int:
        return self.width // self.heads

    @property
    def key_size(self) -> int:
        return self.head_size if self.hidden is None else self.hidden


class AdditiveAttention(nn.Module):
    """Additive attention on ``(b, n, width)``; ``forward`` for whole sequences, ``step`` for decoding through a state.

    Projections start as N(0, 1/width), the scoring vector as N(0, 1/hidden), so that scores start at unit scale; the
    gain as ``hidden ** -0.5``, the bias inside the tanh, which is that of ``q``, as 0.
    """

    def __init__(self, config: AdditiveConfig) -> None:
        super().__init__()
        self.config = c = config
        self.q = nn.Linear(c.width, c.heads * c.key_size)
        self.k = nn.Linear(c.width, c.heads * c.key_size, bias=False)
        self.v = nn.Linear(c.width, c.width, bias=False)
        self.o = nn.Linear(c.width, c.width, bias=False)
        for linear in (self.q, self.k, self.v, self.o):
            nn.init.normal_(linear.weight, std=c.width**-0.5)
        nn.init.zeros_(self.q.bias)
        self.score = nn.Parameter(torch.randn(c.heads, c.key_size) * c.key_size**-0.5)
        self.gain = nn.Parameter(torch.full((c.heads,), c.key_size**-0.5)) if c.normalised else None

    def forward(self, x: Tensor, context: Tensor | None = None, *, mask: Mask | None = None) -> Tensor:
        """Attend within ``x`` ``(b, m, width)``, or from ``x`` to ``context`` ``(b, n, width)`` (cross-attention).

        ``mask`` joins the layer's own, for what belongs to the batch: padding, documents. Cross-attention has no mask
        but ``mask``. Returns ``(b, m, width)``.
        """
        own = self.config.mask if context is None else None
        return self._attend(self._heads(self.q(x)), *self._keys(x if context is None else context), joined(own, mask))

    def state(
        self,
        batch: int,
        capacity: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> KVState:
        """An empty state for ``capacity`` tokens: projected keys and values, so that a step projects its token only."""
        c = self.config
        if c.mask is None:
            raise ValueError("a bidirectional layer cannot decode: give it a causal mask")
        return KVState(batch, c.heads, capacity, c.key_size, c.head_size, dtype=dtype, device=device)

    def step(self, x: Tensor, state: KVState) -> tuple[Tensor, KVState]:
        """Feed the next token or tokens ``x`` ``(b, m, width)``; any split of a sequence gives ``forward``'s rows."""
        view, mask = state.append(*self._keys(x)).for_queries(self.config.mask, x.shape[1])
        return self._attend(self._heads(self.q(x)), view.k, view.v, mask), state

    def cost(self, m: int, n: int, *, batch: int = 1, dtype: torch.dtype = torch.float32) -> Cost:
        """What the attention of ``m`` new tokens over ``n`` takes, and the state that holds ``n``."""
        c = self.config
        sizes = Sizes(batch, c.heads, c.heads, m, n, c.key_size, c.head_size)
        return cost(sizes, mask=c.mask, itemsize=dtype.itemsize)

    def _keys(self, source: Tensor) -> tuple[Tensor, Tensor]:
        return self._heads(self.k(source)), self._heads(self.v(source))

    def _heads(self, x: Tensor) -> Tensor:
        heads: Tensor = x.unflatten(-1, (self.config.heads, -1)).transpose(1, 2)
        return heads

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask | None) -> Tensor:
        o = additive_attention(q, k, v, self.score, self.gain, mask=mask, backend=self.config.backend)
        y: Tensor = self.o(o.transpose(1, 2).flatten(2))
        return y
