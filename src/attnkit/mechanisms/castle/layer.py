"""The layer: seven projections, and a state whose lookahead keys move with every token."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from attnkit.mechanisms.castle import castle_attention, castle_attention_step, cost
from attnkit.positions import Rotary
from attnkit.projected import check_rotary
from attnkit.spec import Cost, Sizes
from attnkit.state import RewrittenState

NAMES = ("q", "k", "v", "lookahead_q", "lookahead_k", "lookahead_v")


@dataclass(frozen=True)
class CastleConfig:
    """A CASTLE layer.

    ``window`` is how many later tokens a lookahead key takes up, None for all; the paper's are 128 and 512.
    A layer of ``heads`` heads has 7/4 of softmax attention's parameters; ``head_size`` None is ``width / heads``.
    ``rotary`` turns all but the values. ``qk_norm`` normalises both pairs of queries and keys.
    """

    width: int
    heads: int
    head_size: int | None = None
    window: int | None = None
    rotary: Rotary | None = None
    qk_norm: bool = False
    backend: str | None = None

    def __post_init__(self) -> None:
        if self.heads < 1 or self.width < 1 or (self.head_size is None and self.width % self.heads):
            raise ValueError(
                f"CastleConfig: got width {self.width} and {self.heads} heads, expected a width that heads divide, "
                f"or a head size"
            )
        if self.size < 1:
            raise ValueError(f"CastleConfig: head size is {self.head_size}, expected at least 1, or None")
        if self.window is not None and self.window < 1:
            raise ValueError(
                f"CastleConfig: window is {self.window}, expected at least 1, or None for all later tokens"
            )
        check_rotary("CastleConfig", self.rotary, self.size)

    @property
    def size(self) -> int:
        return self.width // self.heads if self.head_size is None else self.head_size


class CastleAttention(nn.Module):
    """CASTLE on ``(b, n, width)``; ``forward`` for whole sequences, ``step`` for decoding through a state.

    Projections start as N(0, 1 / inputs).
    """

    def __init__(self, config: CastleConfig) -> None:
        super().__init__()
        self.config = c = config
        inner = c.heads * c.size
        self.q, self.k, self.v, self.lookahead_q, self.lookahead_k, self.lookahead_v = (
            nn.Linear(c.width, inner, bias=False) for _ in NAMES
        )
        self.o = nn.Linear(inner, c.width, bias=False)
        for linear in (*(getattr(self, name) for name in NAMES), self.o):
            nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
        self.q_norm, self.k_norm, self.lookahead_q_norm, self.lookahead_k_norm = (
            nn.RMSNorm(c.size) if c.qk_norm else nn.Identity() for _ in range(4)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Attend within ``x`` ``(b, n, width)``; returns the same shape."""
        c = self.config
        return self._out(castle_attention(*self._project(x, 0), window=c.window, backend=c.backend))

    def state(
        self,
        batch: int,
        capacity: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> RewrittenState:
        """An empty state for ``capacity`` tokens: keys, values, lookahead keys, and the lookahead queries still needed.

        Lookahead keys are sums over tokens, and so in float32 at least.
        """
        c = self.config
        fields = dict.fromkeys(("k", "v", "u"), (c.heads, c.size))
        if c.window is None:
            fields["lookahead_q"] = (c.heads, c.size)
        tail = (0 if c.window is None else min(c.window, capacity), c.heads * c.size)
        sums = {"u": torch.promote_types(dtype, torch.float32)}
        return RewrittenState(batch, capacity, fields, tail, dtype=dtype, device=device, dtypes=sums)

    def step(self, x: Tensor, state: RewrittenState) -> tuple[Tensor, RewrittenState]:
        """Feed the next token or tokens ``x`` ``(b, m, width)``; any split of a sequence gives ``forward``'s rows."""
        c, m, before = self.config, x.shape[1], state.length
        q, k, v, lookahead_q, lookahead_k, lookahead_v = self._project(x, before)
        new = {"k": k, "v": v, "u": torch.zeros_like(k, dtype=state.view()["u"].dtype)}
        if c.window is None:
            held = state.append(**new, lookahead_q=lookahead_q)
            queries = held["lookahead_q"]
        else:
            held = state.append(**new)
            kept = torch.cat([state.tail.unflatten(-1, (c.heads, -1)).transpose(1, 2), lookahead_q], 2)
            state.tail = kept[:, :, m:].transpose(1, 2).flatten(2)
            queries = kept[:, :, kept.shape[2] - m - min(before, c.window) :]  # zeros stand before the first token
        o, u = castle_attention_step(
            q, held["k"], held["v"], queries, lookahead_k, lookahead_v, held["u"], window=c.window
        )
        state.rewrite(u=u)
        return self._out(o), state

    def cost(self, m: int, n: int, *, batch: int = 1, dtype: torch.dtype = torch.float32) -> Cost:
        """What the attention of ``m`` new tokens over ``n`` takes, and the state that holds ``n``."""
        c = self.config
        return cost(Sizes(batch, c.heads, c.heads, m, n, c.size, c.size), window=c.window, itemsize=dtype.itemsize)

    def _project(self, x: Tensor, start: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        q, k, v, lookahead_q, lookahead_k, lookahead_v = (
            getattr(self, name)(x).unflatten(-1, (-1, self.config.size)).transpose(1, 2) for name in NAMES
        )
        q, k = self.q_norm(q), self.k_norm(k)
        lookahead_q, lookahead_k = self.lookahead_q_norm(lookahead_q), self.lookahead_k_norm(lookahead_k)
        if self.config.rotary is not None:
            # A lookahead key is a key, and so are the values that it sums: all but v turn.
            turn, positions = self.config.rotary.rotate, torch.arange(start, start + x.shape[1], device=x.device)
            q, k, lookahead_q, lookahead_k, lookahead_v = (
                turn(y, positions) for y in (q, k, lookahead_q, lookahead_k, lookahead_v)
            )
        return q, k, v, lookahead_q, lookahead_k, lookahead_v

    def _out(self, o: Tensor) -> Tensor:
        y: Tensor = self.o(o.transpose(1, 2).flatten(2))
        return y
