"""The layer: projections and drawn blocks around ``bigbird_attention``."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from attnkit.masks import Mask, random_blocks
from attnkit.masks.held import Padding
from attnkit.mechanisms.bigbird import bigbird_attention, cost
from attnkit.positions import Rotary
from attnkit.projected import Projected, check_heads, check_rotary
from attnkit.shapes import check_groups
from attnkit.spec import Cost, Sizes


@dataclass(frozen=True)
class BigBirdConfig:
    """A BigBird layer, bidirectional: for encoders.

    ``window`` and ``random`` count blocks of ``block`` positions. ``seed`` draws the random ones, so give each layer of
    a model its own. ``kv_heads`` None is one KV head a query head. ``rotary`` turns queries and keys.
    """

    width: int
    heads: int
    block: int = 64
    window: int = 3
    random: int = 3
    seed: int = 0
    kv_heads: int | None = None
    rotary: Rotary | None = None
    bias: bool = False
    backend: str | None = None

    def __post_init__(self) -> None:
        check_heads("BigBirdConfig", self.width, self.heads)
        check_groups("BigBirdConfig", self.heads, self.groups)
        if self.block < 1 or self.random < 0 or self.window < 1 or self.window % 2 == 0:
            raise ValueError(
                f"BigBirdConfig: block is {self.block}, window {self.window} and random {self.random}, expected a "
                f"block of at least 1, an odd window and at least 0 random blocks"
            )
        check_rotary("BigBirdConfig", self.rotary, self.head_size)

    @property
    def groups(self) -> int:
        return self.heads if self.kv_heads is None else self.kv_heads

    @property
    def head_size(self) -> int:
        return self.width // self.heads

    @property
    def full_blocks(self) -> int:
        """Up to so many blocks every one sees every other, as in the released models: little is saved there."""
        return 2 * self.random + 5


class BigBirdAttention(Projected):
    """BigBird attention on ``(b, n, width)``; projections start as N(0, 1/width)."""

    def __init__(self, config: BigBirdConfig) -> None:
        c = config
        super().__init__(c.width, c.heads, c.groups, c.head_size, rotary=c.rotary, bias=c.bias)
        self.config = c

    def forward(self, x: Tensor, *, mask: Mask | None = None) -> Tensor:
        """Attend within ``x`` ``(b, n, width)``; returns the same shape. ``mask`` is ``attnkit.padding(keep)`` or None.

        The blocks depend on the seed and ``n`` alone: evaluation, and a backward that computes anew, see the same ones.
        """
        c, n = self.config, x.shape[1]
        if mask is not None and not isinstance(mask, Padding):
            raise NotImplementedError(f"BigBirdAttention got the mask {mask!r}, expected attnkit.padding(keep)")
        keep = None if mask is None else mask.tensor.to(x.device).expand(len(x), -1)
        blocks = -(-n // c.block)
        random = c.random if blocks > c.full_blocks else blocks
        drawn = _drawn(blocks, c.window, random, c.heads, c.seed).to(x.device)
        o = bigbird_attention(*self._project(x, 0), drawn, block=c.block, window=c.window, keep=keep, backend=c.backend)
        return self._out(o)

    def cost(self, m: int, n: int, *, batch: int = 1, dtype: torch.dtype = torch.float32) -> Cost:
        """What the attention of ``n`` tokens takes; ``m`` is ``n``, for there is no decoding."""
        c = self.config
        sizes = Sizes(batch, c.heads, c.groups, m, n, c.head_size, c.head_size)
        blocks = -(-n // c.block)
        random = c.random if blocks > c.full_blocks else blocks
        return cost(sizes, block=c.block, window=c.window, random=random, itemsize=dtype.itemsize)


@lru_cache(maxsize=64)
def _drawn(blocks: int, window: int, random: int, heads: int, seed: int) -> Tensor:
    with torch.inference_mode(False):  # an inference tensor could not be used in a later backward
        return random_blocks(blocks, window=window, random=random, heads=heads, seed=seed)
