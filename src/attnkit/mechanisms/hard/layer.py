"""The layer: projections, positions and a decoding state around ``hard_attention``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from attnkit.masks import Mask, causal
from attnkit.mechanisms.hard import cost, hard_attention
from attnkit.positions import Rotary
from attnkit.shapes import check_groups
from attnkit.spec import Cost, Sizes
from attnkit.state import KVState


@dataclass(frozen=True)
class HardConfig:
    """A hard attention layer.

    ``kind`` is how it trains: "argmax" or "gumbel", both straight-through; ``draw`` is for REINFORCE. Evaluation takes
    the best key whatever the kind, unless ``seed`` says to draw, always the same. ``temperature`` is the first one of
    the layer, whose own ``temperature`` may be lowered as training goes on. ``kv_heads`` None is one KV head a query
    head, ``mask`` None is bidirectional.
    """

    width: int
    heads: int
    kv_heads: int | None = None
    kind: Literal["argmax", "gumbel"] = "argmax"
    temperature: float = 1.0
    seed: int | None = None
    mask: Mask | None = field(default_factory=causal)
    rotary: Rotary | None = None
    qk_norm: bool = False
    backend: str | None = None

    def __post_init__(self) -> None:
        if self.heads < 1 or self.width < 1 or self.width % self.heads:
            raise ValueError(
                f"HardConfig: got width {self.width} and {self.heads} heads, expected a width that heads divide"
            )
        check_groups("HardConfig", self.heads, self.groups)
        if self.kind not in ("argmax", "gumbel"):
            raise ValueError(f"HardConfig: kind is {self.kind!r}, expected 'argmax' or 'gumbel': call draw to sample")
        if self.rotary is not None and self.rotary.head_size != self.head_size:
            raise ValueError(
                f"HardConfig: rotary is made for head size {self.rotary.head_size}, heads have {self.head_size}"
            )

    @property
    def groups(self) -> int:
        return self.heads if self.kv_heads is None else self.kv_heads

    @property
    def head_size(self) -> int:
        return self.width // self.heads


class HardAttention(nn.Module):
    """Hard attention on ``(b, n, width)``; ``forward`` for whole sequences, ``step`` for decoding through a state.

    Projections start as N(0, 1/width), so that logits have the unit scale that the noise has as well.
    """

    def __init__(self, config: HardConfig) -> None:
        super().__init__()
        self.config = c = config
        self.temperature = c.temperature
        self.q, self.o = (nn.Linear(c.width, c.width, bias=False) for _ in range(2))
        self.k, self.v = (nn.Linear(c.width, c.groups * c.head_size, bias=False) for _ in range(2))
        for linear in (self.q, self.k, self.v, self.o):
            nn.init.normal_(linear.weight, std=c.width**-0.5)
        self.q_norm, self.k_norm = (nn.RMSNorm(c.head_size) if c.qk_norm else nn.Identity() for _ in range(2))

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
        q, k, v, joined = self._sequence(x, context, mask)
        o, log_prob, entropy = hard_attention(
            q, k, v, mask=joined, kind="sample", seed=seed, return_log_prob=True, backend=self.config.backend
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
        q, k, v = self._project(x, x, state.length)
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
        if context is not None:
            return *self._project(x, context, None), mask
        own = self.config.mask
        return *self._project(x, x, 0), own & mask if own is not None and mask is not None else own or mask

    def _project(self, x: Tensor, source: Tensor, start: int | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values; with positions from ``start`` on unless it is None."""
        c = self.config
        q, k, v = (
            y.unflatten(-1, (-1, c.head_size)).transpose(1, 2) for y in (self.q(x), self.k(source), self.v(source))
        )
        q, k = self.q_norm(q), self.k_norm(k)
        if c.rotary is not None and start is not None:
            positions = torch.arange(start, start + x.shape[1], device=x.device)
            q, k = c.rotary.rotate(q, positions), c.rotary.rotate(k, positions)
        return q, k, v

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask | None) -> Tensor:
        c = self.config
        how: dict[str, Any] = {"kind": c.kind if self.training else "argmax"}
        if not self.training and c.seed is not None:
            how = {"kind": "gumbel", "seed": c.seed}
        o: Tensor = hard_attention(q, k, v, mask=mask, temperature=self.temperature, backend=c.backend, **how)
        return o

    def _out(self, o: Tensor) -> Tensor:
        y: Tensor = self.o(o.transpose(1, 2).flatten(2))
        return y
