"""The layer: projections, gates through a narrow map, a norm of each head and a swish gate around ``gla_attention``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid, silu

from attnkit.costs import gla as cost
from attnkit.mechanisms.gla import gla_attention, gla_attention_step
from attnkit.shapes import check_groups
from attnkit.spec import Cost, Sizes
from attnkit.state import RecurrentState

# Names of flash-linear-attention's layer, and ours.
FLA = {
    "q_proj.weight": "q.weight",
    "k_proj.weight": "k.weight",
    "v_proj.weight": "v.weight",
    "gk_proj.0.weight": "low.weight",
    "gk_proj.1.weight": "decay.weight",
    "gk_proj.1.bias": "decay.bias",
    "g_proj.weight": "gate.weight",
    "g_norm_swish_gate.weight": "norm.weight",
    "o_proj.weight": "o.weight",
}


@dataclass(frozen=True)
class GatedLinearConfig:
    """A gated linear attention layer; its gates are its positions.

    Keys have ``head_size`` channels, half of width / heads when None, values ``value_size``, width / heads when None.
    ``kv_heads`` None is one KV head a query head. The gates come from a map of rank ``rank`` and are
    ``sigmoid(...) ** (1 / temper)``, which starts them near 1.
    """

    width: int
    heads: int
    kv_heads: int | None = None
    head_size: int | None = None
    value_size: int | None = None
    rank: int = 16
    temper: float = 16.0
    backend: str | None = None

    def __post_init__(self) -> None:
        given = self.head_size is not None and self.value_size is not None
        if self.heads < 1 or self.width < 1 or (self.width % (2 * self.heads) and not given):
            raise ValueError(
                f"GatedLinearConfig: got width {self.width} and {self.heads} heads, expected a width that twice the "
                f"heads divide, or head_size= and value_size="
            )
        check_groups("GatedLinearConfig", self.heads, self.groups)
        if self.rank < 1 or self.temper <= 0:
            raise ValueError(
                f"GatedLinearConfig: rank is {self.rank} and temper {self.temper}, expected at least 1 and above 0"
            )

    @property
    def groups(self) -> int:
        return self.heads if self.kv_heads is None else self.kv_heads

    @property
    def keys(self) -> int:
        """Channels of a head's keys."""
        return self.width // (2 * self.heads) if self.head_size is None else self.head_size

    @property
    def values(self) -> int:
        """Channels of a head's values."""
        return self.width // self.heads if self.value_size is None else self.value_size


class GatedLinearAttention(nn.Module):
    """Gated linear attention on ``(b, n, width)``; ``forward`` for whole sequences, ``step`` through a state.

    Projections start as N(0, 1 / inputs), the gates' bias as 0: a gate of 0.957, which keeps half after 16 tokens.
    """

    def __init__(self, config: GatedLinearConfig) -> None:
        super().__init__()
        self.config = c = config
        self.q = nn.Linear(c.width, c.heads * c.keys, bias=False)
        self.k = nn.Linear(c.width, c.groups * c.keys, bias=False)
        self.v = nn.Linear(c.width, c.groups * c.values, bias=False)
        self.low = nn.Linear(c.width, c.rank, bias=False)
        self.decay = nn.Linear(c.rank, c.groups * c.keys)
        self.gate = nn.Linear(c.width, c.heads * c.values, bias=False)
        self.o = nn.Linear(c.heads * c.values, c.width, bias=False)
        for linear in (self.q, self.k, self.v, self.low, self.decay, self.gate, self.o):
            nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
        nn.init.zeros_(self.decay.bias)
        self.norm = nn.RMSNorm(c.values, eps=1e-5)

    def load_fla(self, weights: Mapping[str, Tensor]) -> None:
        """Take the weights of flash-linear-attention's layer of this size, without convolutions, by its names."""
        if weights.keys() != FLA.keys():
            raise ValueError(f"load_fla: got weights {sorted(weights)}, expected {sorted(FLA)}")
        self.load_state_dict({FLA[name]: x for name, x in weights.items()})

    def forward(self, x: Tensor, *, keep: Tensor | None = None) -> Tensor:
        """Attend within ``x`` ``(b, n, width)``; returns the same shape. ``keep`` (b, n) is False for padding."""
        return self._out(x, gla_attention(*self._project(x), keep=keep, backend=self.config.backend))

    def state(
        self,
        batch: int,
        capacity: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> RecurrentState:
        """An empty state, of one size whatever ``capacity`` is."""
        c = self.config
        return RecurrentState(batch, {"state": (c.groups, c.keys, c.values)}, dtype=dtype, device=device)

    def step(self, x: Tensor, state: RecurrentState, *, keep: Tensor | None = None) -> tuple[Tensor, RecurrentState]:
        """Feed the next token or tokens ``x`` ``(b, m, width)``; any split of a sequence gives ``forward``'s rows."""
        o, after = gla_attention_step(*self._project(x), _held(state), keep=keep)
        state.advance(x.shape[1], state=after)
        return self._out(x, o), state

    def cost(self, m: int, n: int, *, batch: int = 1, dtype: torch.dtype = torch.float32) -> Cost:
        """What ``m`` new tokens after ``n - m`` take, and the state."""
        c = self.config
        return cost(Sizes(batch, c.heads, c.groups, m, n, c.keys, c.values), itemsize=dtype.itemsize)

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        c = self.config
        # Half precision would round the gates of slow channels to 1.
        gates = self.decay(self.low(x)).to(torch.promote_types(x.dtype, torch.float32))
        decays = logsigmoid(gates) / c.temper
        q, k, log_decay = (y.unflatten(-1, (-1, c.keys)).transpose(1, 2) for y in (self.q(x), self.k(x), decays))
        v = self.v(x).unflatten(-1, (-1, c.values)).transpose(1, 2)
        return q, k, v, log_decay

    def _out(self, x: Tensor, o: Tensor) -> Tensor:
        y: Tensor = self.o(self.norm(o.transpose(1, 2)).flatten(2) * silu(self.gate(x)))
        return y


def _held(state: RecurrentState) -> Tensor:
    return state.view()["state"]
