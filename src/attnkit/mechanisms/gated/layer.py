"""The layer: projections, the gate's own map of the input, rotary on all or the first channels, and a plain cache."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from attnkit.masks import Mask, causal
from attnkit.mechanisms.gated import cost, gated_attention
from attnkit.positions import Rotary
from attnkit.projected import MaskedAttention, check_rotary
from attnkit.shapes import check_groups
from attnkit.spec import Cost, Sizes


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
        check_rotary("GatedConfig", self.rotary, self.size)

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


class GatedAttention(MaskedAttention):
    """Gated attention on ``(b, n, width)``; ``forward`` for whole sequences, ``step`` for decoding through a state.

    All maps start as N(0, 1/width) and have no biases; the gates start around a half. The state holds keys and
    values: the gate needs none.
    """

    config: GatedConfig
    gate: nn.Linear

    def __init__(self, config: GatedConfig) -> None:
        c = config
        gate = nn.Linear(c.width, c.heads * c.gates, bias=False)
        sizes, further = (c.width, c.heads, c.groups, c.size), {"gate": gate}
        super().__init__(*sizes, rotary=c.rotary, qk_norm=c.qk_norm, eps=c.eps, further=further)
        self.config = c

    def cost(self, m: int, n: int, *, batch: int = 1, dtype: torch.dtype = torch.float32) -> Cost:
        """What the attention of ``m`` new tokens over ``n`` takes, and the state that holds ``n``."""
        c = self.config
        sizes = Sizes(batch, c.heads, c.groups, m, n, c.size, c.size)
        return cost(sizes, mask=c.mask, gates=c.gates, itemsize=dtype.itemsize)

    def _attend(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Mask | None) -> Tensor:
        c = self.config
        gate = self.gate(x).unflatten(-1, (c.heads, c.gates)).transpose(1, 2)
        o: Tensor = gated_attention(q, k, v, gate, mask=mask, backend=c.backend)
        return o
