"""The layer: projections of the finest level, the maps between levels, and one that joins what all of them found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from attnkit.mechanisms.hierarchical import cost, hierarchical_attention, hierarchical_attention_step
from attnkit.positions import Rotary
from attnkit.projected import Heads, check_rotary
from attnkit.spec import Cost, Sizes
from attnkit.state import PyramidState


@dataclass(frozen=True)
class HierarchicalConfig(Heads):
    """A pyramid of ``levels`` attentions, each over every second token of the one below.

    ``inner`` is the width of tokens above the finest level, ``width`` when None. ``kv_heads`` None is one KV head a
    query head. ``qk_norm`` normalises queries and keys of every level.
    """

    levels: int = 3
    inner: int | None = None
    rotary: Rotary | None = None
    qk_norm: bool = False
    backend: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.levels < 1 or self.inner_width < 1:
            raise ValueError(
                f"HierarchicalConfig: got {self.levels} levels and inner {self.inner_width}, expected at least 1 each"
            )
        check_rotary("HierarchicalConfig", self.rotary, self.head_size)

    @property
    def inner_width(self) -> int:
        return self.width if self.inner is None else self.inner


class HierarchicalAttention(nn.Module):
    """The pyramid on ``(b, n, width)``; ``forward`` for whole sequences, ``step`` for decoding through a state.

    All maps start as N(0, 1/inputs).
    """

    def __init__(self, config: HierarchicalConfig) -> None:
        super().__init__()
        self.config = c = config
        self.q = _map(c.width, c.width)
        self.k, self.v = (_map(c.width, c.groups * c.head_size) for _ in range(2))
        self.o = _map(c.levels * c.width, c.width)
        size, above = c.head_size, c.levels - 1
        self.down = _maps(above, c.width, c.inner_width)
        self.q_above = _maps(above, c.inner_width, c.width)
        self.k_above, self.v_above = (_maps(above, c.inner_width, c.groups * size) for _ in range(2))

        self.q_gain, self.k_gain = (nn.Parameter(torch.ones(c.levels, size)) if c.qk_norm else None for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """Attend within ``x`` ``(b, n, width)``; returns the same shape."""
        c = self.config
        o = hierarchical_attention(*self._project(x), *self._between(), **self._norms(), backend=c.backend)
        return self._out(o)

    def state(
        self,
        batch: int,
        capacity: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> PyramidState:
        """An empty state for ``capacity`` tokens: a cache a level, and the results that stand until the next token."""
        c = self.config
        sizes = (c.head_size, c.head_size)
        return PyramidState(batch, c.groups, c.levels, capacity, *sizes, results=c.heads, dtype=dtype, device=device)

    def step(self, x: Tensor, state: PyramidState) -> tuple[Tensor, PyramidState]:
        """Feed the next token or tokens ``x`` ``(b, m, width)``; any split of a sequence gives ``forward``'s rows."""
        o = hierarchical_attention_step(*self._project(x), state, *self._between(), **self._norms())
        return self._out(o), state

    def cost(self, m: int, n: int, *, batch: int = 1, dtype: torch.dtype = torch.float32) -> Cost:
        """What the attention of ``m`` new tokens over ``n`` takes, and the state that holds ``n``."""
        c = self.config
        sizes = Sizes(batch, c.heads, c.groups, m, n, c.head_size, c.head_size)
        return cost(sizes, levels=c.levels, inner=c.inner_width, itemsize=dtype.itemsize)

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        size = self.config.head_size
        q, k, v = (linear(x).unflatten(-1, (-1, size)).transpose(1, 2) for linear in (self.q, self.k, self.v))
        return q, k, v

    def _between(self) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        size = self.config.head_size
        if self.config.levels == 1:
            return None, None, None, None
        down = [linear.weight.unflatten(1, (-1, size)).permute(1, 2, 0) for linear in self.down]
        q, k, v = (
            torch.stack([linear.weight.unflatten(0, (-1, size)).mT for linear in maps])
            for maps in (self.q_above, self.k_above, self.v_above)
        )
        return torch.stack(down), q, k, v

    def _norms(self) -> dict[str, Any]:
        return {"q_gain": self.q_gain, "k_gain": self.k_gain, "rotary": self.config.rotary}

    def _out(self, o: Tensor) -> Tensor:
        y: Tensor = self.o(o.transpose(1, 2).flatten(2))
        return y


def _maps(count: int, inputs: int, outputs: int) -> Sequence[nn.Linear]:
    return cast("Sequence[nn.Linear]", nn.ModuleList(_map(inputs, outputs) for _ in range(count)))


def _map(inputs: int, outputs: int) -> nn.Linear:
    linear = nn.Linear(inputs, outputs, bias=False)
    nn.init.normal_(linear.weight, std=inputs**-0.5)
    return linear
