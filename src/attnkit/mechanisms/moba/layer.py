"""The layer: projections, head norms, positions and a decoding state around ``moba_attention``."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attnkit.mechanisms.moba import check, cost, moba_attention, moba_attention_step
from attnkit.mechanisms.moba.gates import block_means
from attnkit.positions import Rotary
from attnkit.projected import Heads, Projected, check_rotary
from attnkit.spec import Cost, Sizes
from attnkit.state import KVState, PooledState


@dataclass(frozen=True)
class MobaConfig(Heads):
    """A MoBA layer; it has no parameters beyond those of softmax attention and can take over its weights.

    ``kv_heads`` None is one KV head a query head. ``block`` and ``top`` are those of ``moba_attention``.
    """

    block: int = 512
    top: int = 3
    rotary: Rotary | None = None
    qk_norm: bool = False
    backend: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check("MobaConfig", block=self.block, top=self.top)
        check_rotary("MobaConfig", self.rotary, self.head_size)


class MobaAttention(Projected):
    """MoBA on ``(b, n, width)``; ``forward`` for whole sequences, ``step`` for decoding through a state.

    Projections start as N(0, 1/width), so that scores start at unit scale.
    """

    def __init__(self, config: MobaConfig) -> None:
        c = config
        super().__init__(c.width, c.heads, c.groups, c.head_size, rotary=c.rotary, qk_norm=c.qk_norm)
        self.config = c

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
