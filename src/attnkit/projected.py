"""What layers around different equations have in common: heads of a width, projections, head norms and positions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from attnkit.masks import Mask, joined
from attnkit.positions import Rotary
from attnkit.shapes import check_groups
from attnkit.state import KVState


@dataclass(frozen=True)
class Heads:
    """The start of a layer's configuration: ``heads`` that divide ``width``.

    ``kv_heads`` None is one KV head a query head.
    """

    width: int
    heads: int
    kv_heads: int | None = None

    def __post_init__(self) -> None:
        where = type(self).__name__
        check_heads(where, self.width, self.heads)
        check_groups(where, self.heads, self.groups)

    @property
    def groups(self) -> int:
        return self.heads if self.kv_heads is None else self.kv_heads

    @property
    def head_size(self) -> int:
        return self.width // self.heads


def check_heads(where: str, width: int, heads: int) -> None:
    """Raise ``ValueError`` unless the heads divide the width."""
    if heads < 1 or width < 1 or width % heads:
        raise ValueError(f"{where}: got width {width} and {heads} heads, expected a width that heads divide")


def check_rotary(where: str, rotary: Rotary | None, size: int) -> None:
    """Raise ``ValueError`` if ``rotary`` is made for heads of another size."""
    if rotary is not None and rotary.head_size != size:
        raise ValueError(f"{where}: rotary is made for head size {rotary.head_size}, heads have {size}")


class Projected(nn.Module):
    """Maps ``q``, ``k`` and ``v`` of an input ``(b, n, width)`` to heads, and ``o`` from heads back to the width.

    ``further`` are a layer's own maps, under their names (None for one that is off). All start as N(0, 1 / inputs) and
    biases as 0. ``qk_norm`` normalises queries and keys over a head, before ``rotary`` turns them; ``norm_size`` is
    what a norm covers, the head when None, and ``eps`` the norms' own.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        groups: int,
        size: int,
        *,
        rotary: Rotary | None = None,
        qk_norm: bool = False,
        norm_size: int | None = None,
        eps: float | None = None,
        bias: bool = False,
        further: Mapping[str, nn.Linear | None] | None = None,
    ) -> None:
        super().__init__()
        self.size, self.rotary, further = size, rotary, further or {}
        self.q = nn.Linear(width, heads * size, bias=bias)
        self.k, self.v = (nn.Linear(width, groups * size, bias=bias) for _ in range(2))
        for name, linear in further.items():
            setattr(self, name, linear)
        self.o = nn.Linear(heads * size, width, bias=bias)
        for linear in (self.q, self.k, self.v, *further.values(), self.o):
            if linear is not None:
                nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
                if linear.bias is not None:
                    nn.init.zeros_(linear.bias)
        self.q_norm, self.k_norm = (
            nn.RMSNorm(norm_size or size, eps=eps) if qk_norm else nn.Identity() for _ in range(2)
        )

    def _project(self, x: Tensor, start: int) -> tuple[Tensor, Tensor, Tensor]:
        """Queries ``(b, h, m, d)``, keys and values ``(b, g, m, d)`` of tokens ``x`` from position ``start`` on."""
        q, k, v = (self._heads(linear(x)) for linear in (self.q, self.k, self.v))
        positions = torch.arange(start, start + x.shape[1], device=x.device)
        return self._placed(self.q_norm, q, positions), self._placed(self.k_norm, k, positions), v

    def _heads(self, y: Tensor) -> Tensor:
        heads: Tensor = y.unflatten(-1, (-1, self.size)).transpose(1, 2)
        return heads

    def _placed(self, norm: nn.Module, y: Tensor, positions: Tensor) -> Tensor:
        """Queries or keys, normed and turned."""
        normed: Tensor = norm(y)
        return normed if self.rotary is None else self.rotary.rotate(normed, positions)

    def _out(self, o: Tensor) -> Tensor:
        y: Tensor = self.o(o.transpose(1, 2).flatten(2))
        return y


class MaskedAttention(Projected):
    """A ``Projected`` layer around an equation that takes any mask and keeps all keys and values to decode.

    A subclass has its equation in ``_attend`` and a ``config`` with ``mask`` (None is bidirectional) and ``groups``.
    """

    config: Any

    def forward(self, x: Tensor, *, mask: Mask | None = None) -> Tensor:
        """Attend within ``x`` ``(b, n, width)``; returns the same shape.

        ``mask`` joins the layer's own, for what belongs to the batch: padding, documents.
        """
        return self._out(self._attend(x, *self._project(x, 0), joined(self.config.mask, mask)))

    def state(
        self,
        batch: int,
        capacity: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> KVState:
        """An empty state for ``capacity`` tokens: all keys, normed and turned, and values."""
        c = self.config
        if c.mask is None:
            raise ValueError("a bidirectional layer cannot decode: give it a causal mask")
        return KVState(batch, c.groups, capacity, self.size, dtype=dtype, device=device)

    def step(self, x: Tensor, state: KVState) -> tuple[Tensor, KVState]:
        """Feed the next token or tokens ``x`` ``(b, m, width)``; any split of a sequence gives ``forward``'s rows."""
        q, k, v = self._project(x, state.length)
        view, mask = state.append(k, v).for_queries(self.config.mask, x.shape[1])
        return self._out(self._attend(x, q, view.k, view.v, mask)), state

    def _attend(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Mask | None) -> Tensor:
        """The heads' results ``(b, h, m, d)``; ``x`` is the layer's input at the queries, for gates that read it."""
        raise NotImplementedError
