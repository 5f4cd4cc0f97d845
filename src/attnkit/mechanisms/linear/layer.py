"""The layer: projections, random features that are drawn once, and a state of fixed size."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attnkit.mechanisms.linear import cost, linear_attention, linear_attention_step, maps, random_count
from attnkit.mechanisms.linear.maps import FeatureMap, random_features
from attnkit.projected import Heads, Projected
from attnkit.spec import Cost, Sizes
from attnkit.state import RecurrentState


@dataclass(frozen=True)
class LinearConfig(Heads):
    """A linear attention layer; it has no positions of its own.

    ``kv_heads`` None is one KV head a query head. ``random`` is how many random features "favor" has, the paper's
    d ln d when None; ``seed`` draws them. ``causal`` False is an encoder's.
    """

    feature_map: FeatureMap = "elu"
    random: int | None = None
    seed: int = 0
    causal: bool = True
    qk_norm: bool = False
    backend: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        maps.check("LinearConfig", self.feature_map, self.feature_map == "favor")
        if self.random is not None and (self.feature_map != "favor" or self.random < 1):
            raise ValueError(
                f"LinearConfig: random is {self.random} with feature_map {self.feature_map!r}, expected at least 1 for "
                f"'favor', or None"
            )

    @property
    def directions(self) -> int:
        """Random features, 0 for maps that have none."""
        return 0 if self.feature_map != "favor" else self.random or random_count(self.head_size)


class LinearAttention(Projected):
    """Linear attention on ``(b, n, width)``; ``forward`` for whole sequences, ``step`` for decoding through a state.

    Projections start as N(0, 1/width), so that queries and keys start at unit scale. Random features are a buffer and
    are saved with the weights.
    """

    projection: Tensor | None

    def __init__(self, config: LinearConfig) -> None:
        c = config
        super().__init__(c.width, c.heads, c.groups, c.head_size, qk_norm=c.qk_norm)
        self.config = c
        drawn = random_features(c.directions, c.head_size, seed=c.seed) if c.directions else None
        self.register_buffer("projection", drawn)

    def redraw(self, seed: int) -> None:
        """Other random features; the paper draws new ones every 1,000 steps of training."""
        if self.projection is None:
            raise ValueError(f"redraw: feature_map is {self.config.feature_map!r}, expected 'favor', which has some")
        self.projection.copy_(random_features(*self.projection.shape, seed=seed))

    def forward(self, x: Tensor, *, keep: Tensor | None = None) -> Tensor:
        """Attend within ``x`` ``(b, n, width)``; returns the same shape. ``keep`` (b, n) is False for padding."""
        c = self.config
        q, k, v = self._project(x, 0)
        o = linear_attention(
            q, k, v, self.projection, feature_map=c.feature_map, causal=c.causal, keep=keep, backend=c.backend
        )
        return self._out(o)

    def state(
        self,
        batch: int,
        capacity: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> RecurrentState:
        """An empty state, of one size whatever ``capacity`` is."""
        c = self.config
        if not c.causal:
            raise ValueError("a bidirectional layer cannot decode: make it with causal=True")
        f = maps.count(c.feature_map, c.head_size, c.directions)
        fields: dict[str, tuple[int, ...]] = {"state": (c.groups, f, c.head_size + 1)}
        fields |= {"largest": (c.groups, 1)} if c.directions else {}
        return RecurrentState(batch, fields, dtype=dtype, device=device)

    def step(self, x: Tensor, state: RecurrentState, *, keep: Tensor | None = None) -> tuple[Tensor, RecurrentState]:
        """Feed the next token or tokens ``x`` ``(b, m, width)``; any split of a sequence gives ``forward``'s rows."""
        q, k, v = self._project(x, 0)
        feature_map = self.config.feature_map
        o, held = linear_attention_step(q, k, v, state.view(), self.projection, feature_map=feature_map, keep=keep)
        state.advance(x.shape[1], **held)
        return self._out(o), state

    def cost(self, m: int, n: int, *, batch: int = 1, dtype: torch.dtype = torch.float32) -> Cost:
        """What the attention of ``m`` new tokens after ``n - m`` takes, and the state."""
        c = self.config
        sizes = Sizes(batch, c.heads, c.groups, m, n, c.head_size, c.head_size)
        return cost(sizes, feature_map=c.feature_map, random=c.directions, causal=c.causal)
