"""The layer: projections, the kernel and the mixtures, head norms and gate around ``multi_token_attention``."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from attnkit.mechanisms.multi_token import cost, multi_token_attention, multi_token_attention_step
from attnkit.positions import Rotary
from attnkit.projected import Heads, Projected, check_rotary
from attnkit.spec import Cost, Sizes
from attnkit.state import RewrittenState


@dataclass(frozen=True)
class MultiTokenConfig(Heads):
    """A multi-token attention layer.

    ``taps`` are the queries and keys that the kernel spans, (1, 1) for none. ``mixed_logits`` and ``mixed_weights``
    are how many heads share their logits and their weights, 1 for none. ``output_norm`` normalises each head's result,
    ``output_gate`` multiplies it by ``sigmoid(W x)``. ``kv_heads`` None is one KV head a query head.
    """

    taps: tuple[int, int] = (6, 11)
    mixed_logits: int = 1
    mixed_weights: int = 2
    rotary: Rotary | None = None
    qk_norm: bool = False
    output_norm: bool = True
    output_gate: bool = False
    backend: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.taps[0] < 1 or self.taps[1] < 1 or self.taps[1] % 2 == 0:
            raise ValueError(f"MultiTokenConfig: taps are {self.taps}, expected queries >= 1 and an odd number of keys")
        for name in ("mixed_logits", "mixed_weights"):
            size = getattr(self, name)
            if size < 1 or self.heads % size:
                raise ValueError(f"MultiTokenConfig: {name} is {size}, expected a divisor of {self.heads} heads")
        check_rotary("MultiTokenConfig", self.rotary, self.head_size)


class MultiTokenAttention(Projected):
    """Multi-token attention on ``(b, n, width)``; ``forward`` for whole sequences, ``step`` through a state.

    Projections start as N(0, 1/width); kernel and mixtures start as the identity, which is softmax attention.
    """

    gate: nn.Linear | None

    def __init__(self, config: MultiTokenConfig) -> None:
        c = config
        gate = nn.Linear(c.width, c.width, bias=False) if c.output_gate else None
        super().__init__(
            c.width, c.heads, c.groups, c.head_size, rotary=c.rotary, qk_norm=c.qk_norm, further={"gate": gate}
        )
        self.config = c
        self.kernel = nn.Parameter(torch.zeros(c.heads, *c.taps)) if c.taps != (1, 1) else None
        if self.kernel is not None:
            with torch.no_grad():
                self.kernel[:, -1, c.taps[1] // 2] = 1
        self.mix_logits, self.mix_weights = (
            nn.Parameter(torch.eye(size).repeat(c.heads // size, 1)) if size > 1 else None
            for size in (c.mixed_logits, c.mixed_weights)
        )
        self.o_norm = nn.RMSNorm(c.head_size) if c.output_norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Attend within ``x`` ``(b, n, width)``; returns the same shape."""
        q, k, v = self._project(x, 0)
        o = multi_token_attention(q, k, v, self.kernel, self.mix_logits, self.mix_weights, backend=self.config.backend)
        return self._gated(x, o)

    def state(
        self,
        batch: int,
        capacity: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> RewrittenState:
        """An empty state for ``capacity`` tokens: keys, values, and the last queries that the kernel reaches."""
        c = self.config
        fields = {"k": (c.groups, c.head_size), "v": (c.groups, c.head_size)}
        return RewrittenState(batch, capacity, fields, (c.taps[0] - 1, c.width), dtype=dtype, device=device)

    def step(self, x: Tensor, state: RewrittenState) -> tuple[Tensor, RewrittenState]:
        """Feed the next token or tokens ``x`` ``(b, m, width)``; any split of a sequence gives ``forward``'s rows."""
        q, k, v = self._project(x, state.length)
        held = state.append(k=k, v=v)
        queries = torch.cat([state.tail.unflatten(-1, (self.config.heads, -1)).transpose(1, 2), q], 2)
        o = multi_token_attention_step(queries, held["k"], held["v"], self.kernel, self.mix_logits, self.mix_weights)
        state.tail = queries[:, :, x.shape[1] :].transpose(1, 2).flatten(2)
        return self._gated(x, o), state

    def cost(self, m: int, n: int, *, batch: int = 1, dtype: torch.dtype = torch.float32) -> Cost:
        """What the attention of ``m`` new tokens over ``n`` takes, and the state that holds ``n``."""
        c = self.config
        sizes = Sizes(batch, c.heads, c.groups, m, n, c.head_size, c.head_size)
        return cost(sizes, taps=c.taps, mixed=(c.mixed_logits, c.mixed_weights), itemsize=dtype.itemsize)

    def _gated(self, x: Tensor, o: Tensor) -> Tensor:
        o = self.o_norm(o)
        return self._out(o if self.gate is None else o * self._heads(torch.sigmoid(self.gate(x))))
