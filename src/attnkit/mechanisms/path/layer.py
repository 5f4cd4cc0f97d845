"""The layer: projections, directions and strengths of the reflections, and a state whose keys move with every token."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid, pad, silu

from attnkit.mechanisms.path import cost, path_attention, path_attention_step
from attnkit.projected import Heads
from attnkit.spec import Cost, Sizes
from attnkit.state import RewrittenState

TAPS = 3


@dataclass(frozen=True)
class PathConfig(Heads):
    """A PaTH attention layer; it has no rotary, the reflections are its positions.

    ``kv_heads`` None is one KV head a query head; each KV head has its own reflections. Directions come from a map of
    rank ``rank``, or from a full one when 0; None is the paper's choice: 32, or full where KV heads are shared.
    ``gates`` adds forget gates (PaTH-FoX), ``qk_norm`` normalises queries and keys.
    """

    rank: int | None = None
    gates: bool = False
    qk_norm: bool = False
    backend: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank is not None and self.rank < 0:
            raise ValueError(f"PathConfig: rank is {self.rank}, expected at least 1, 0 for a full map, or None")

    @property
    def low(self) -> int:
        """Rank of the map to directions, 0 for a full one."""
        return self.rank if self.rank is not None else 32 if self.groups == self.heads else 0


class PathAttention(nn.Module):
    """PaTH attention on ``(b, n, width)``; ``forward`` for whole sequences, ``step`` for decoding through a state.

    Projections start as N(0, 1 / inputs), the bias of the strengths as 0 (beta = 1, which projects the direction out).
    """

    def __init__(self, config: PathConfig) -> None:
        super().__init__()
        self.config = c = config
        inner = c.groups * c.head_size
        self.q = nn.Linear(c.width, c.width, bias=False)
        self.k, self.v = (nn.Linear(c.width, inner, bias=False) for _ in range(2))
        self.low = nn.Linear(c.width, c.low, bias=False) if c.low else None
        self.w = nn.Linear(c.low or c.width, inner, bias=False)
        self.conv = nn.Conv1d(inner, inner, TAPS, groups=inner, bias=False)
        self.beta = nn.Linear(c.width, c.groups)
        self.forget = nn.Linear(c.width, c.heads) if c.gates else None
        self.o = nn.Linear(c.width, c.width, bias=False)
        for linear in (self.q, self.k, self.v, self.low, self.w, self.beta, self.forget, self.o):
            if linear is not None:
                nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
                if linear.bias is not None:
                    nn.init.zeros_(linear.bias)
        self.q_norm, self.k_norm = (nn.RMSNorm(c.head_size) if c.qk_norm else nn.Identity() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """Attend within ``x`` ``(b, n, width)``; returns the same shape."""
        q, k, v = self._project(x)
        w = self._directions(pad(self._raw(x), (0, 0, TAPS - 1, 0)))
        return self._out(path_attention(q, k, v, w, self._beta(x), self._gates(x), backend=self.config.backend))

    def state(
        self,
        batch: int,
        capacity: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> RewrittenState:
        """An empty state for ``capacity`` tokens: moving keys, values, sums of gates, the convolution's last rows."""
        c = self.config
        fields = {"k": (c.groups, c.head_size), "v": (c.groups, c.head_size)}
        sums = {"total": torch.promote_types(dtype, torch.float32)} if c.gates else {}
        fields |= {"total": (c.heads, 1)} if c.gates else {}
        tail = (TAPS - 1, c.groups * c.head_size)
        return RewrittenState(batch, capacity, fields, tail, dtype=dtype, device=device, dtypes=sums)

    def step(self, x: Tensor, state: RewrittenState) -> tuple[Tensor, RewrittenState]:
        """Feed the next token or tokens ``x`` ``(b, m, width)``; any split of a sequence gives ``forward``'s rows."""
        q, k, v = self._project(x)
        raw = torch.cat([state.tail, self._raw(x)], 1)
        gates, new = self._gates(x), {"k": k, "v": v}
        if gates is not None:
            before = state.view()["total"][:, :, -1:, 0]
            new["total"] = torch.cat([before, gates], -1).cumsum(-1)[..., before.shape[-1] :, None]
        held = state.append(**new)
        total = held["total"][..., 0] if gates is not None else None
        o, keys = path_attention_step(q, held["k"], held["v"], self._directions(raw), self._beta(x), total)
        state.rewrite(k=keys.to(k.dtype))
        state.tail = raw[:, -(TAPS - 1) :]
        return self._out(o), state

    def cost(self, m: int, n: int, *, batch: int = 1, dtype: torch.dtype = torch.float32) -> Cost:
        """What the attention of ``m`` new tokens over ``n`` takes, and the state that holds ``n``."""
        c = self.config
        sizes = Sizes(batch, c.heads, c.groups, m, n, c.head_size, c.head_size)
        return cost(sizes, gates=c.gates, itemsize=dtype.itemsize)

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (self._heads(linear(x)) for linear in (self.q, self.k, self.v))
        return self.q_norm(q), self.k_norm(k), v

    def _heads(self, y: Tensor) -> Tensor:
        heads: Tensor = y.unflatten(-1, (-1, self.config.head_size)).transpose(1, 2)
        return heads

    def _raw(self, x: Tensor) -> Tensor:
        """Directions before the convolution, ``(b, m, g * d)``."""
        y: Tensor = self.w(x if self.low is None else self.low(x))
        return y

    def _directions(self, raw: Tensor) -> Tensor:
        """Unit vectors ``(b, g, m, d)`` of the ``m`` newest of ``m + 2`` rows."""
        mixed = self._heads(silu(self.conv(raw.mT).mT))
        work = mixed.to(torch.promote_types(mixed.dtype, torch.float32))
        unit: Tensor = work * torch.rsqrt(work.square().sum(-1, keepdim=True) + 1e-6)
        return unit.to(raw.dtype)

    def _beta(self, x: Tensor) -> Tensor:
        logits: Tensor = self.beta(x).to(torch.promote_types(x.dtype, torch.float32))
        return 2 * torch.sigmoid(logits).mT

    def _gates(self, x: Tensor) -> Tensor | None:
        if self.forget is None:
            return None
        return logsigmoid(self.forget(x).to(torch.promote_types(x.dtype, torch.float32))).mT

    def _out(self, o: Tensor) -> Tensor:
        y: Tensor = self.o(o.transpose(1, 2).flatten(2))
        return y
