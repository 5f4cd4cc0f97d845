"""The layer: projections, head norms, positions and a decoding state around ``moba_attention``."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from attnkit.mechanisms.moba import check, cost, moba_attention, moba_attention_step
from attnkit.mechanisms.moba.gates import block_means
from attnkit.positions import Rotary
from attnkit.shapes import check_groups
from attnkit.spec import Cost, Sizes
from attnkit.state import KVState, PooledState


@dataclass(frozen=True)
class MobaConfig:
    """A MoBA layer; it has no parameters beyond those of softmax attention and can take over its weights.

    ``kv_heads`` None is one KV head a query head. ``block`` and ``top`` are those of ``moba_attention``.
    """

    width: int
    heads: int
    kv_heads: int | None = None
    block: int = 512
    top: int = 3
    rotary: Rotary | None = None
    qk_norm: bool = False
    backend: str | None = None

    def __post_init__(self) -> None:
        if self.heads < 1 or self.width < 1 or self.width % self.heads:
            raise ValueError(
                f"MobaConfig: got width {self.width} and {self.heads} heads, expected a width that heads divide"
            )
        check_groups("MobaConfig", self.heads, self.groups)
        check("MobaConfig", block=self.block, top=self.top)
        if self.rotary is not None and self.rotary.head_size != self.head_size:
            raise ValueError(
                f"MobaConfig: rotary is made for head size {self.rotary.head_size}, heads have {self.head_size}"
            )

    @property
    def groups(self) -> int:
        return self.heads if self.kv_heads is None else self.kv_heads

    @property
    def head_size(self) -> int:
        return self.width // self.heads


class MobaAttention(nn.Module):
    """MoBA on ``(b, n, width)``; ``forward`` for whole sequences, ``step`` for decoding through a state.

    Projections start as N(0, 1/width), so that scores start at unit scale.
    """

    def __init__(self, config: MobaConfig) -> None:
        super().__init__()
        self.config = c = config
        self.q = nn.Linear(c.width, c.width, bias=False)
        self.k, self.v = (nn.Linear(c.width, c.groups * c.head_size, bias=False) for _ in range(2))
        self.o = nn.Linear(c.width, c.width, bias=False)
        for linear in (self.q, self.k, self.v, self.o):
            nn.init.normal_(linear.weight, std=c.width**-0.5)
        self.q_norm, self.k_norm = (nn.RMSNorm(c.head_size) if c.qk_norm else nn.Identity() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """Attend within ``x`` ``(b, n, width)``; returns the same shape."""
        c, (q, k, v) = self.config, self._project(x, 0)
        return self._out(moba_attention(q, k, v, block=c.block, top=c.top, backend=c.backend))

    def state(
        self,
        batch: int,
        capacity: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> PooledState:
        """An empty state for ``capacity`` tokens: any block may be chosen later, so all keys are kept, and means."""
        c = self.config
        tokens = KVState(batch, c.groups, capacity, c.head_size, dtype=dtype, device=device)
        wide = torch.promote_types(dtype, torch.float32)
        means = {"mean": (c.groups, c.head_size)}
        return PooledState(batch, capacity, {"tokens": tokens}, means, size=c.block, dtype=wide, device=device)

    def step(self, x: Tensor, state: PooledState) -> tuple[Tensor, PooledState]:
        """Feed the next token or tokens ``x`` ``(b, m, width)``; any split of a sequence gives ``forward``'s rows."""
        c, (q, k, v) = self.config, self._project(x, state.length)
        view = state.parts["tokens"].append(k, v)
        due = state.due()
        if due:
            state.pooled.append(mean=block_means(view.k[:, :, due.start * c.block : due.stop * c.block], c.block))
        means = state.pooled.view()["mean"]
        return self._out(moba_attention_step(q, view.k, view.v, means, block=c.block, top=c.top)), state

    def cost(self, m: int, n: int, *, batch: int = 1, dtype: torch.dtype = torch.float32) -> Cost:
        """What the attention of ``m`` new tokens over ``n`` takes, and the state that holds ``n``."""
        c = self.config
        sizes = Sizes(batch, c.heads, c.groups, m, n, c.head_size, c.head_size)
        return cost(sizes, block=c.block, top=c.top, itemsize=dtype.itemsize)

    def _project(self, x: Tensor, start: int) -> tuple[Tensor, Tensor, Tensor]:
        size = self.config.head_size
        q, k, v = (y(x).unflatten(-1, (-1, size)).transpose(1, 2) for y in (self.q, self.k, self.v))
        q, k = self.q_norm(q), self.k_norm(k)
        if self.config.rotary is not None:
            positions = torch.arange(start, start + x.shape[1], device=x.device)
            q, k = self.config.rotary.rotate(q, positions), self.config.rotary.rotate(k, positions)
        return q, k, v

    def _out(self, o: Tensor) -> Tensor:
        y: Tensor = self.o(o.transpose(1, 2).flatten(2))
        return y
