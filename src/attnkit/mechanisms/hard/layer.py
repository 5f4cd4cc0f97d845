"""The layer: projections, positions and a decoding state around ``hard_attention``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from attnkit.masks import Mask, causal, joined
from attnkit.mechanisms.hard import cost, hard_attention
from attnkit.positions import Rotary
from attnkit.projected import Heads, Projected, check_rotary
from attnkit.spec import Cost, Sizes
from attnkit.state import KVState


@dataclass(frozen=True)
class HardConfig(Heads):
    """A hard attention layer.

    ``kind`` is how it trains: "argmax" or "gumbel", both straight-through; ``draw`` is for REINFORCE. Evaluation takes
    the best key whatever the kind, unless ``seed`` says to draw, always the same. ``temperature`` is the first one of
    the layer, whose own ``temperature`` may be lowered as training goes on. ``kv_heads`` None is one KV head a query
    head, ``mask`` None is bidirectional.
    """

    kind: Literal["argmax", "gumbel"] = "argmax"
    temperature: float = 1.0
    seed: int | None = None
    mask: Mask | None = field(default_factory=causal)
    rotary: Rotary | None = None
    qk_norm: bool = False
    backend: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kind not in ("argmax", "gumbel"):
            raise ValueError(f"HardConfig: kind is {self.kind!r}, expected 'argmax' or 'gumbel': call draw to sample")
        check_rotary("HardConfig", self.rotary, self.head_size)


class HardAttention(Projected):
    """Hard attention on ``(b, n, width)``; ``forward`` for whole sequences, ``step`` for decoding through a state.

    Projections start as N(0, 1/width), so that logits have the unit scale that the noise has as well.
    """

    def __init__(self, config: HardConfig) -> None:
        c = config
        super().__init__(c.width, c.heads, c.groups, c.head_size, rotary=c.rotary, qk_norm=c.qk_norm)
        self.config = c
        self.temperature = c.temperature

    def forward(self, x: Tensor, context: Tensor | None = None, *, mask: Mask | None = None) -> Tensor:
        """Attend within ``x`` ``(b, m, width)``, or from ``x`` to ``context`` ``(b, n, width)`` (cross-attention).

        ``mask`` joins the layer's own, for what belongs to the batch: padding, documents. Cross-attention has no
        positions and no mask but ``mask``. Returns ``(b, m, width)``.
        """
        return self._out(self._attend(*self._sequence(x, context, mask)))

    def draw(
        self, x: Tensor, context: Tensor | None = None, *, mask: Mask | None = None, seed: int | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """``forward`` with keys drawn from the softmax of their scores, for ``ReinforceLoss``.

        Returns ``(b, m, width)``, whose gradient does not reach the scores, and the choices' log-probabilities and
        their entropies, ``(b, heads, m)`` each, whose gradients do. ``seed`` replays the draw.
        """
        q, k, v, seen = self._sequence(x, context, mask)
        o, log_prob, entropy = hard_attention(
            q, k, v, mask=seen, kind="sample", seed=seed, return_log_prob=True, backend=self.config.backend
        )
        return self._out(o), log_prob, entropy

    def state(
        self,
        batch: int,
        capacity: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> KVState:
        """An empty state for ``capacity`` tokens: all keys in their order, by which ties and noise go."""
        c = self.config
        if c.mask is None:
            raise ValueError("a bidirectional layer cannot decode: give it a causal mask")
        return KVState(batch, c.groups, capacity, c.head_size, dtype=dtype, device=device)

    def step(self, x: Tensor, state: KVState) -> tuple[Tensor, KVState]:
        """Feed the next token or tokens ``x`` ``(b, m, width)``; any split of a sequence gives ``forward``'s rows.

        In evaluation, that is: a layer in training draws new noise at each call.
        """
        q, k, v = self._project(x, state.length)
        view = state.append(k, v)
        return self._out(self._attend(q, view.k, view.v, self.config.mask)), state

    def cost(self, m: int, n: int, *, batch: int = 1, dtype: torch.dtype = torch.float32) -> Cost:
        """What the attention of ``m`` new tokens over ``n`` takes, and the state that holds ``n``."""
        c = self.config
        sizes = Sizes(batch, c.heads, c.groups, m, n, c.head_size, c.head_size)
        return cost(sizes, mask=c.mask, itemsize=dtype.itemsize)

    def _sequence(
        self, x: Tensor, context: Tensor | None, mask: Mask | None
    ) -> tuple[Tensor, Tensor, Tensor, Mask | None]:
        if context is None:
            return *self._project(x, 0), joined(self.config.mask, mask)
        q, k, v = (self._heads(y) for y in (self.q(x), self.k(context), self.v(context)))
        return self.q_norm(q), self.k_norm(k), v, mask

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask | None) -> Tensor:
        c = self.config
        how: dict[str, Any] = {"kind": c.kind if self.training else "argmax"}
        if not self.training and c.seed is not None:
            how = {"kind": "gumbel", "seed": c.seed}
        o: Tensor = hard_attention(q, k, v, mask=mask, temperature=self.temperature, backend=c.backend, **how)
        return o
