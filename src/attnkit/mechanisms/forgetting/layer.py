"""The layer: projections, forget gates and the optional norms and output gate around ``forgetting_attention``."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from attnkit.mechanisms.forgetting import cost, forgetting_attention, forgetting_attention_step
from attnkit.positions import Rotary
from attnkit.shapes import check_groups
from attnkit.spec import Cost, Sizes
from attnkit.state import TokenState


@dataclass(frozen=True)
class ForgettingConfig:
    """A forgetting attention layer; with the three options on, the paper's "Pro" layer without its shift of keys.

    ``kv_heads`` None is one KV head a query head. The gates give the order of tokens, so ``rotary`` is off by default.
    ``qk_norm`` normalises queries and keys, ``output_norm`` each head's result, ``output_gate`` multiplies the result
    by ``sigmoid(W x)``.
    """

    width: int
    heads: int
    kv_heads: int | None = None
    rotary: Rotary | None = None
    qk_norm: bool = False
    output_norm: bool = False
    output_gate: bool = False
    backend: str | None = None

    def __post_init__(self) -> None:
        if self.heads < 1 or self.width < 1 or self.width % self.heads:
            raise ValueError(
                f"ForgettingConfig: got width {self.width} and {self.heads} heads, expected a width that heads divide"
            )
        check_groups("ForgettingConfig", self.heads, self.groups)
        if self.rotary is not None and self.rotary.head_size != self.head_size:
            raise ValueError(
                f"ForgettingConfig: rotary is made for head size {self.rotary.head_size}, heads have {self.head_size}"
            )

    @property
    def groups(self) -> int:
        return self.heads if self.kv_heads is None else self.kv_heads

    @property
    def head_size(self) -> int:
        return self.width // self.heads


class ForgettingAttention(nn.Module):
    """Forgetting attention on ``(b, n, width)``; ``forward`` for whole sequences, ``step`` through a state.

    Projections start as N(0, 1/width), the gates' bias as 0: a gate of 1/2, which keeps one token in eight after three.
    """

    def __init__(self, config: ForgettingConfig) -> None:
        super().__init__()
        self.config = c = config
        self.q = nn.Linear(c.width, c.width, bias=False)
        self.k, self.v = (nn.Linear(c.width, c.groups * c.head_size, bias=False) for _ in range(2))
        self.forget = nn.Linear(c.width, c.heads)
        self.gate = nn.Linear(c.width, c.width, bias=False) if c.output_gate else None
        self.o = nn.Linear(c.width, c.width, bias=False)
        for linear in (self.q, self.k, self.v, self.forget, self.gate, self.o):
            if linear is not None:
                nn.init.normal_(linear.weight, std=c.width**-0.5)
        nn.init.zeros_(self.forget.bias)
        self.q_norm, self.k_norm, self.o_norm = (
            nn.RMSNorm(c.head_size) if wanted else nn.Identity() for wanted in (c.qk_norm, c.qk_norm, c.output_norm)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Attend within ``x`` ``(b, n, width)``; returns the same shape."""
        q, k, v, log_f = self._project(x, 0)
        return self._out(x, forgetting_attention(q, k, v, log_f, backend=self.config.backend))

    def state(
        self,
        batch: int,
        capacity: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> TokenState:
        """An empty state for ``capacity`` tokens: keys, values, and the sums of gates in float32 at least."""
        c = self.config
        fields = {"k": (c.groups, c.head_size), "v": (c.groups, c.head_size), "total": (c.heads, 1)}
        sums = torch.promote_types(dtype, torch.float32)
        return TokenState(batch, capacity, fields, dtype=dtype, device=device, dtypes={"total": sums})

    def step(self, x: Tensor, state: TokenState) -> tuple[Tensor, TokenState]:
        """Feed the next token or tokens ``x`` ``(b, m, width)``; any split of a sequence gives ``forward``'s rows."""
        q, k, v, log_f = self._project(x, state.length)
        held = state.append(k=k, v=v, total=_continued(state, log_f)[..., None])
        return self._out(x, forgetting_attention_step(q, held["k"], held["v"], held["total"][..., 0])), state

    def cost(self, m: int, n: int, *, batch: int = 1, dtype: torch.dtype = torch.float32) -> Cost:
        """What the attention of ``m`` new tokens over ``n`` takes, and the state that holds ``n``."""
        c = self.config
        return cost(Sizes(batch, c.heads, c.groups, m, n, c.head_size, c.head_size), itemsize=dtype.itemsize)

    def _project(self, x: Tensor, start: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        q, k, v = (y.unflatten(-1, (-1, self.config.head_size)).transpose(1, 2) for y in self._linears(x))
        q, k = self.q_norm(q), self.k_norm(k)
        if self.config.rotary is not None:
            positions = torch.arange(start, start + x.shape[1], device=x.device)
            q, k = self.config.rotary.rotate(q, positions), self.config.rotary.rotate(k, positions)
        forget = self.forget(x).to(torch.promote_types(x.dtype, torch.float32))
        return q, k, v, logsigmoid(forget).transpose(1, 2)

    def _linears(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.q(x), self.k(x), self.v(x)

    def _out(self, x: Tensor, o: Tensor) -> Tensor:
        mixed = self.o_norm(o).transpose(1, 2).flatten(2)
        y: Tensor = self.o(mixed if self.gate is None else mixed * torch.sigmoid(self.gate(x)))
        return y


def _continued(state: TokenState, log_f: Tensor) -> Tensor:
    """Sums of gates ``(b, h, m)`` of new tokens, going on from the last that the state holds."""
    before = state.view()["total"][:, :, -1:, 0]
    return torch.cat([before, log_f], -1).cumsum(-1)[..., before.shape[-1] :]
