"""The layer: projections, a short convolution, gates and norms around ``delta_attention``, as published three times."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attnkit.convolution import ShortConvolution
from attnkit.costs import delta as cost
from attnkit.mechanisms.delta import delta_attention
from attnkit.shapes import check_groups
from attnkit.spec import Cost, Sizes
from attnkit.state import RecurrentState


@dataclass(frozen=True)
class DeltaConfig:
    """A delta rule layer; DeltaNet with the defaults.

    ``heads`` counts values, states and ``beta``; ``key_heads``, None for as many, counts queries and keys, which serve
    ``heads / key_heads`` states each. ``key_size`` and ``value_size`` are those of a head, None for ``width / heads``.
    ``decay`` is None, one a ``"head"`` (Gated DeltaNet) or one a ``"channel"`` of the keys (Kimi Delta Attention).
    ``gate`` multiplies the normalised result by ``silu`` or ``sigmoid`` of a map of the input, a channel. ``rank``
    makes that map, and the one to a decay a channel, a product of two through this many channels; 0 leaves them whole.
    ``negative`` lets ``beta`` reach 2. ``taps`` is the reach of the convolution, ``eps`` that of the output's norm.
    """

    width: int
    heads: int
    key_heads: int | None = None
    key_size: int | None = None
    value_size: int | None = None
    decay: Literal["head", "channel"] | None = None
    gate: Literal["silu", "sigmoid"] | None = None
    rank: int = 0
    negative: bool = False
    taps: int = 4
    eps: float = 1e-6
    backend: str | None = None

    def __post_init__(self) -> None:
        if self.heads < 1 or self.width < 1 or (None in (self.key_size, self.value_size) and self.width % self.heads):
            raise ValueError(
                f"DeltaConfig: got width {self.width} and {self.heads} heads, expected a width that heads divide, "
                f"or key_size and value_size"
            )
        check_groups("DeltaConfig", self.heads, self.groups)
        for name, value, allowed in (
            ("decay", self.decay, (None, "head", "channel")),
            ("gate", self.gate, (None, "silu", "sigmoid")),
        ):
            if value not in allowed:
                raise ValueError(f"DeltaConfig: {name} is {value!r}, expected one of {allowed}")
        if min(self.keys, self.values) < 1 or self.rank < 0:
            raise ValueError(
                f"DeltaConfig: got key size {self.keys}, value size {self.values} and rank {self.rank}, expected "
                f"sizes of at least 1 and a rank of at least 0"
            )

    @property
    def groups(self) -> int:
        return self.heads if self.key_heads is None else self.key_heads

    @property
    def keys(self) -> int:
        """Channels of a key head."""
        return self.width // self.heads if self.key_size is None else self.key_size

    @property
    def values(self) -> int:
        """Channels of a value head."""
        return self.width // self.heads if self.value_size is None else self.value_size


class DeltaAttention(nn.Module):
    """A delta rule layer on ``(b, n, width)``; ``forward`` for whole sequences, ``step`` through a state.

    Projections start as N(0, 1 / inputs). Decay rates start as uniform numbers of 1 to 16 a head, times steps spread
    evenly on a logarithmic scale from 0.001 to 0.1, as in Mamba-2: memories of a few tokens up to a thousand.
    """

    def __init__(self, config: DeltaConfig) -> None:
        super().__init__()
        self.config = c = config
        keys, values = c.groups * c.keys, c.heads * c.values
        self.q, self.k = (nn.Linear(c.width, keys, bias=False) for _ in range(2))
        self.v = nn.Linear(c.width, values, bias=False)
        self.conv = ShortConvolution(2 * keys + values, c.taps)
        self.beta = nn.Linear(c.width, c.heads, bias=False)
        rates = {None: 0, "head": c.heads, "channel": c.heads * c.keys}[c.decay]
        self.decay = _map(c.width, rates, c.rank if c.decay == "channel" else 0) if rates else None
        self.log_rate = nn.Parameter(torch.empty(c.heads).uniform_(1, 16).log()) if rates else None
        self.decay_bias = nn.Parameter(_steps(rates)) if rates else None
        self.gate = _map(c.width, values, c.rank) if c.gate else None
        self.norm = nn.RMSNorm(c.values, eps=c.eps)
        self.o = nn.Linear(values, c.width, bias=False)
        for linear in self.modules():
            if isinstance(linear, nn.Linear):
                nn.init.normal_(linear.weight, std=linear.in_features**-0.5)

    def forward(self, x: Tensor, *, keep: Tensor | None = None) -> Tensor:
        """Attend within ``x`` ``(b, n, width)``; returns the same shape.

        ``keep``, bool ``(b, n)``, is False for padding, wherever it stands: the other tokens do not notice it, and its
        own rows are 0.
        """
        return self._run(x, None, keep)

    def state(
        self,
        batch: int,
        capacity: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> RecurrentState:
        """An empty state, of one size for any ``capacity``: ``d x e`` a head, and the convolution's last inputs."""
        c = self.config
        fields, tails = {"state": (c.heads, c.keys, c.values)}, {"conv": self.conv.tail_shape}
        return RecurrentState(batch, fields, tails=tails, dtype=dtype, device=device)

    def step(self, x: Tensor, state: RecurrentState, *, keep: Tensor | None = None) -> tuple[Tensor, RecurrentState]:
        """Feed the next token or tokens ``x`` ``(b, m, width)``; any split of a sequence gives ``forward``'s rows.

        ``keep``, bool ``(b, m)``, is False for padding, which leaves the state as it is.
        """
        return self._run(x, state, keep), state

    def cost(self, m: int, n: int, *, batch: int = 1, dtype: torch.dtype = torch.float32) -> Cost:
        """What the attention of ``m`` new tokens takes, whatever came before, and the state."""
        c = self.config
        rows, channels = self.conv.tail_shape
        sizes = Sizes(batch, c.heads, c.groups, m, n, c.keys, c.values)
        return cost(sizes, tail=rows * channels, itemsize=dtype.itemsize)

    def _run(self, x: Tensor, state: RecurrentState | None, keep: Tensor | None) -> Tensor:
        if keep is None:
            return self._attend(x, state, None)
        if keep.shape != x.shape[:2] or keep.dtype != torch.bool:
            raise ValueError(
                f"DeltaAttention: keep is {keep.dtype} {tuple(keep.shape)}, expected bool {tuple(x.shape[:2])}"
            )
        # Padding goes to the end, where it is no neighbour of any token for the convolution.
        order = (~keep).to(torch.uint8).argsort(dim=1, stable=True)
        places = order[..., None].expand_as(x)
        tokens = torch.where(keep[..., None], x, 0.0).gather(1, places)
        rows = self._attend(tokens, state, keep.sum(1))
        return torch.where(keep[..., None], torch.zeros_like(rows).scatter(1, places, rows), 0.0)

    def _attend(self, x: Tensor, state: RecurrentState | None, lengths: Tensor | None) -> Tensor:
        """Rows for ``x``, of which the first ``lengths`` ``(b,)`` are tokens."""
        c = self.config
        held = {} if state is None else state.view()
        mixed, tail = self.conv(torch.cat([self.q(x), self.k(x), self.v(x)], -1), held.get("conv"), lengths)
        keys = c.groups * c.keys
        q, k, v = mixed.split([keys, keys, c.heads * c.values], -1)
        q, k = (_unit(_heads(y, c.groups)) for y in (q, k))
        beta, log_decay = self._gates(x, lengths)
        last = held.get("state")
        found = delta_attention(
            q.repeat_interleave(c.heads // c.groups, 1) if c.groups < c.heads else q,
            k,
            _heads(v, c.heads),
            beta,
            log_decay,
            last,
            return_state=True,
            backend=c.backend,
        )
        o, last = found
        if state is not None:
            state.advance(x.shape[1], state=last, conv=tail)
        return self._out(x, o)

    def _gates(self, x: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """``beta`` (b, h, m) and ``log_decay``, which are 0 for padding: it then leaves the state alone."""
        c = self.config
        work = torch.promote_types(x.dtype, torch.float32)
        beta = torch.sigmoid(self.beta(x).to(work)).mT * (2 if c.negative else 1)
        there = None
        if lengths is not None:
            there = (torch.arange(x.shape[1], device=x.device) < lengths[:, None])[:, None]
            beta = beta * there
        if self.decay is None or self.log_rate is None or self.decay_bias is None:
            return beta, None
        steps = F.softplus(self.decay(x).to(work) + self.decay_bias.to(work)).unflatten(-1, (c.heads, -1))
        log_decay = (-self.log_rate.to(work).exp()[:, None] * steps).transpose(1, 2)
        if there is not None:
            log_decay = log_decay * there[..., None]
        return beta, log_decay if c.decay == "channel" else log_decay[..., 0]

    def _out(self, x: Tensor, o: Tensor) -> Tensor:
        rows = self.norm(o.transpose(1, 2))
        if self.gate is not None:
            act = F.silu if self.config.gate == "silu" else torch.sigmoid
            rows = rows * act(self.gate(x)).unflatten(-1, (self.config.heads, -1))
        y: Tensor = self.o(rows.flatten(2))
        return y


def _map(inputs: int, outputs: int, rank: int) -> nn.Module:
    """A linear map, or one through ``rank`` channels when that is not 0."""
    if not rank:
        return nn.Linear(inputs, outputs, bias=False)
    return nn.Sequential(nn.Linear(inputs, rank, bias=False), nn.Linear(rank, outputs, bias=False))


def _steps(count: int) -> Tensor:
    """Numbers whose softplus is spread over 0.001 to 0.1, evenly on a logarithmic scale."""
    steps = torch.empty(count).uniform_(math.log(1e-3), math.log(1e-1)).exp()
    return steps + (-torch.expm1(-steps)).log()


def _heads(y: Tensor, heads: int) -> Tensor:
    split: Tensor = y.unflatten(-1, (heads, -1)).transpose(1, 2)
    return split


def _unit(y: Tensor) -> Tensor:
    """Vectors of unit length along the last axis, computed in float32; a vector of zeros stays zeros."""
    work = y.to(torch.promote_types(y.dtype, torch.float32))
    unit: Tensor = work * torch.rsqrt(work.square().sum(-1, keepdim=True) + 1e-6)
    return unit.to(y.dtype)
