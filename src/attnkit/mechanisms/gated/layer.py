"""The layer: projections, the gate's own map of the input, rotary on all or the first channels, and a plain cache."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from attnkit.masks import Mask, causal
from attnkit.mechanisms.gated import cost, gated_attention
from attnkit.positions import Rotary
from attnkit.shapes import check_groups
from attnkit.spec import Cost, Sizes
from attnkit.state import KVState


@dataclass(frozen=True)
class GatedConfig:
    """A gated attention layer; with ``by_channel`` each channel of a head has a gate of its own, else each head one.

    ``kv_heads`` None is one KV head a query head, and ``head_size`` None is ``width / heads``. ``rotary`` may turn only
    the first channels (``Rotary.rotary_size``). ``qk_norm`` normalises queries and keys before that, with a learned
    weight and ``eps``. ``mask`` None is bidirectional.
    """

    width: int
    heads: int
    kv_heads: int | None = None
    head_size: int | None = None
    by_channel: bool = True
    rotary: Rotary | None = None
    qk_norm: bool = False
    eps: float = 1e-6
    mask: Mask | None = field(default_factory=causal)
    backend: str | None = None

    def __post_init__(self) -> None:
        if self.heads < 1 or self.width < 1 or (self.head_size is None and self.width % self.heads):
            raise ValueError(
                f"GatedConfig: got width {self.width} and {self.heads} heads, expected a width that heads divide, or a "
                f"head_size"
            )
        check_groups("GatedConfig", self.heads, self.groups)
        if self.rotary is not None and self.rotary.head_size != self.size:
            raise ValueError(
                f"GatedConfig: rotary is made for head size {self.rotary.head_size}, heads have {self.size}"
            )

    @property
    def groups(self) -> int:
        return self.heads if self.kv_heads is None else self.kv_heads

    @property
    def size(self) -> int:
        return self.width // self.heads if self.head_size is None else self.head_size

    @property
    def gates(self) -> int:
        """Gates a head."""
        return self.size if self.by_channel else 1


class GatedAttention(nn.Module):
    """Gated attention on ``(b, n, width)``; ``forward`` for whole sequences, ``step`` for decoding through a state.

    All maps start as N(0, 1/width) and have no biases; the gates start around a half.
    """

    def __init__(self, config: GatedConfig) -> None:
        super().__init__()
        self.config = c = config
        self.q = nn.Linear(c.width, c.heads * c.size, bias=False)
        self.k, self.v = (nn.Linear(c.width, c.groups * c.size, bias=False) for _ in range(2))
        self.gate = nn.Linear(c.width, c.heads * c.gates, bias=False)
        self.o = nn.Linear(c.heads * c.size, c.width, bias=False)
        for linear in (self.q, self.k, self.v, self.gate, self.o):
            nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
        self.q_norm, self.k_norm = (nn.RMSNorm(c.size, eps=c.eps) if c.qk_norm else nn.Identity() for _ in range(2))

    def forward(self, x: Tensor, *, mask: Mask | None = None) -> Tensor:
        """Attend within ``x`` ``(b, n, width)``; returns the same shape.

        ``mask`` joins the layer's own, for what belongs to the batch: padding, documents.
        """
        own = self.config.mask
        joined = own & mask if own is not None and mask is not None else own or mask
        return self._attend(x, *self._project(x, 0), joined)

    def state(
        self,
        batch: int,
        capacity: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> KVState:
        """An empty state for ``capacity`` tokens: the gate needs none."""
        c = self.config
        if c.mask is None:
            raise ValueError("a bidirectional layer cannot decode: give it a causal mask")
        return KVState(batch, c.groups, capacity, c.size, dtype=dtype, device=device)

    def step(self, x: Tensor, state: KVState) -> tuple[Tensor, KVState]:
        """Feed the next token or tokens ``x`` ``(b, m, width)``; any split of a sequence gives ``forward``'s rows."""
        q, k, v = self._project(x, state.length)
        view, mask = state.append(k, v).for_queries(self.config.mask, x.shape[1])
        return self._attend(x, q, view.k, view.v, mask), state

    def cost(self, m: int, n: int, *, batch: int = 1, dtype: torch.dtype = torch.float32) -> Cost:
        """What the attention of ``m`` new tokens over ``n`` takes, and the state that holds ``n``."""
        c = self.config
        sizes = Sizes(batch, c.heads, c.groups, m, n, c.size, c.size)
        return cost(sizes, mask=c.mask, gates=c.gates, itemsize=dtype.itemsize)

    def _project(self, x: Tensor, start: int) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (y(x).unflatten(-1, (-1, self.config.size)).transpose(1, 2) for y in (self.q, self.k, self.v))
        q, k = self.q_norm(q), self.k_norm(k)
        if (rotary := self.config.rotary) is not None:
            positions = torch.arange(start, start + x.shape[1], device=x.device)
            q, k = rotary.rotate(q, positions), rotary.rotate(k, positions)
        return q, k, v

    def _attend(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Mask | None) -> Tensor:
        c = self.config
        gate = self.gate(x).unflatten(-1, (c.heads, c.gates)).transpose(1, 2)
        o = gated_attention(q, k, v, gate, mask=mask, backend=c.backend)
        y: Tensor = self.o(o.transpose(1, 2).flatten(2))
        return y
