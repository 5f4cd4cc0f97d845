"""The layer: projections, forget gates and the optional norms and output gate around ``forgetting_attention``."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from attnkit.mechanisms.forgetting import cost, forgetting_attention, forgetting_attention_step
from attnkit.positions import Rotary
from attnkit.projected import Heads, Projected, check_rotary
from attnkit.spec import Cost, Sizes
from attnkit.state import TokenState


@dataclass(frozen=True)
class ForgettingConfig(Heads):
    """A forgetting attention layer; with the three options on, the paper's "Pro" layer without its shift of keys.

    ``kv_heads`` None is one KV head a query head. The gates give the order of tokens, so ``rotary`` is off by default.
    ``qk_norm`` normalises queries and keys, ``output_norm`` each head's result, ``output_gate`` multiplies the result
    by ``sigmoid(W x)``.
    """

    rotary: Rotary | None = None
    qk_norm: bool = False
    output_norm: bool = False
    output_gate: bool = False
    backend: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_rotary("ForgettingConfig", self.rotary, self.head_size)


class ForgettingAttention(Projected):
    """Forgetting attention on ``(b, n, width)``; ``forward`` for whole sequences, ``step`` through a state.

    Projections start as N(0, 1/width), the gates' bias as 0: a gate of 1/2, which keeps one token in eight after three.
    """

    forget: nn.Linear
    gate: nn.Linear | None

    def __init__(self, config: ForgettingConfig) -> None:
        c = config
        further = {
            "forget": nn.Linear(c.width, c.heads),
            "gate": nn.Linear(c.width, c.width, bias=False) if c.output_gate else None,
        }
        super().__init__(c.width, c.heads, c.groups, c.head_size, rotary=c.rotary, qk_norm=c.qk_norm, further=further)
        self.config = c
        self.o_norm = nn.RMSNorm(c.head_size) if c.output_norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Attend within ``x`` ``(b, n, width)``; returns the same shape."""
        o = forgetting_attention(*self._project(x, 0), self._log_forget(x), backend=self.config.backend)
        return self._gated(x, o)

    def state(
        self,
        batch: int,
        capacity: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> TokenState:
        """An empty state for ``capacity`` tokens: keys, values, and the sums of gates in float64."""
        c = self.config
        fields = {"k": (c.groups, c.head_size), "v": (c.groups, c.head_size), "total": (c.heads, 1)}
        return TokenState(batch, capacity, fields, dtype=dtype, device=device, dtypes={"total": torch.float64})

    def step(self, x: Tensor, state: TokenState) -> tuple[Tensor, TokenState]:
        """Feed the next token or tokens ``x`` ``(b, m, width)``; any split of a sequence gives ``forward``'s rows."""
        q, k, v = self._project(x, state.length)
        held = state.append(k=k, v=v, total=_continued(state, self._log_forget(x))[..., None])
        return self._gated(x, forgetting_attention_step(q, held["k"], held["v"], held["total"][..., 0])), state

    def cost(self, m: int, n: int, *, batch: int = 1, dtype: torch.dtype = torch.float32) -> Cost:
        """What the attention of ``m`` new tokens over ``n`` takes, and the state that holds ``n``."""
        c = self.config
        return cost(Sizes(batch, c.heads, c.groups, m, n, c.head_size, c.head_size), itemsize=dtype.itemsize)

    def _log_forget(self, x: Tensor) -> Tensor:
        forget = self.forget(x).to(torch.promote_types(x.dtype, torch.float32))
        return logsigmoid(forget).transpose(1, 2)

    def _gated(self, x: Tensor, o: Tensor) -> Tensor:
        o = self.o_norm(o)
        return self._out(o if self.gate is None else o * self._heads(torch.sigmoid(self.gate(x))))


def _continued(state: TokenState, log_f: Tensor) -> Tensor:
    """Sums of gates ``(b, h, m)`` of new tokens, going on from the last that the state holds."""
    before = state.view()["total"][:, :, -1:, 0]
    return torch.cat([before, log_f], -1).cumsum(-1)[..., before.shape[-1] :]
