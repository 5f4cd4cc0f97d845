"""The layer: two sets of projections around ``longformer_attention``, one of them for global tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from attnkit.masks import Mask
from attnkit.masks.held import Padding
from attnkit.mechanisms.longformer import cost, longformer_attention
from attnkit.positions import Rotary
from attnkit.projected import check_heads, check_rotary
from attnkit.shapes import check_groups
from attnkit.spec import Cost, Sizes


@dataclass(frozen=True)
class LongformerConfig:
    """A Longformer layer, bidirectional: for encoders.

    ``radius`` is how far a local token sees on either side, half of the paper's window. ``global_tokens`` are the
    positions that are global unless a call says others. ``kv_heads`` None is one KV head a query head. ``rotary`` turns
    queries and keys of both kinds; without it positions are left to what is embedded.
    """

    width: int
    heads: int
    radius: int = 256
    global_tokens: tuple[int, ...] = (0,)
    kv_heads: int | None = None
    rotary: Rotary | None = None
    bias: bool = False
    backend: str | None = None

    def __post_init__(self) -> None:
        check_heads("LongformerConfig", self.width, self.heads)
        check_groups("LongformerConfig", self.heads, self.groups)
        if self.radius < 0 or min(self.global_tokens, default=0) < 0:
            raise ValueError(
                f"LongformerConfig: radius is {self.radius} and global_tokens {self.global_tokens}, expected at least 0"
            )
        check_rotary("LongformerConfig", self.rotary, self.head_size)

    @property
    def groups(self) -> int:
        return self.heads if self.kv_heads is None else self.kv_heads

    @property
    def head_size(self) -> int:
        return self.width // self.heads


class LongformerAttention(nn.Module):
    """Longformer attention on ``(b, n, width)``.

    Projections start as N(0, 1/width), those of global tokens as copies of the others, as in the paper.
    """

    def __init__(self, config: LongformerConfig) -> None:
        super().__init__()
        self.config = c = config
        sizes = {"q": c.width, "k": c.groups * c.head_size, "v": c.groups * c.head_size}
        self.q, self.k, self.v = (nn.Linear(c.width, size, bias=c.bias) for size in sizes.values())
        self.global_q, self.global_k, self.global_v = (nn.Linear(c.width, size, bias=c.bias) for size in sizes.values())
        self.o = nn.Linear(c.width, c.width, bias=c.bias)
        for linear in (self.q, self.k, self.v, self.o):
            nn.init.normal_(linear.weight, std=c.width**-0.5)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)
        for name in sizes:
            getattr(self, f"global_{name}").load_state_dict(getattr(self, name).state_dict())

    def forward(self, x: Tensor, *, mask: Mask | None = None, global_tokens: Tensor | None = None) -> Tensor:
        """Attend within ``x`` ``(b, n, width)``; returns the same shape.

        ``mask`` is ``attnkit.padding(keep)`` or None. ``global_tokens`` ``(b, n)`` bool marks the global tokens of each
        sequence; None takes those of the configuration.
        """
        b, n, _ = x.shape
        if mask is not None and not isinstance(mask, Padding):
            raise NotImplementedError(f"LongformerAttention got the mask {mask!r}, expected attnkit.padding(keep)")
        positions = self._positions(b, n, x.device) if global_tokens is None else _listed(global_tokens, b, n)
        everywhere = torch.arange(n, device=x.device)
        asking = x.gather(1, positions.clamp(min=0)[..., None].expand(-1, -1, x.shape[2]))
        o = longformer_attention(
            self._heads(self.q(x), everywhere),
            self._heads(self.k(x), everywhere),
            self._heads(self.v(x)),
            self._heads(self.global_q(asking), positions),
            self._heads(self.global_k(x), everywhere),
            self._heads(self.global_v(x)),
            positions,
            radius=self.config.radius,
            keep=None if mask is None else mask.tensor.to(x.device).expand(b, -1),
            backend=self.config.backend,
        )
        y: Tensor = self.o(o.transpose(1, 2).flatten(2))
        return y

    def cost(self, m: int, n: int, *, batch: int = 1, dtype: torch.dtype = torch.float32) -> Cost:
        """What the attention of ``n`` tokens takes; ``m`` is ``n``, for there is no decoding."""
        c = self.config
        sizes = Sizes(batch, c.heads, c.groups, m, n, c.head_size, c.head_size)
        return cost(sizes, radius=c.radius, tokens=len(c.global_tokens), itemsize=dtype.itemsize)

    def _positions(self, b: int, n: int, device: torch.device) -> Tensor:
        listed = [position for position in sorted(set(self.config.global_tokens)) if position < n]
        return torch.tensor(listed, dtype=torch.int64, device=device).expand(b, -1)

    def _heads(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        heads: Tensor = x.unflatten(-1, (-1, self.config.head_size)).transpose(1, 2)
        return heads if positions is None or self.config.rotary is None else self.config.rotary.rotate(heads, positions)


def _listed(marks: Tensor, b: int, n: int) -> Tensor:
    """Positions ``(b, c)`` of the marked tokens, -1 behind those of sequences that have fewer than ``c``."""
    if marks.dtype != torch.bool or tuple(marks.shape) != (b, n):
        raise ValueError(
            f"LongformerAttention: global_tokens is {marks.dtype} of shape {tuple(marks.shape)}, "
            f"expected torch.bool of shape {(b, n)}"
        )
    most = int(marks.sum(-1).max()) if b and n else 0
    order = torch.argsort(marks.int(), dim=-1, descending=True, stable=True)[:, :most]
    return torch.where(marks.gather(1, order), order, -1)
