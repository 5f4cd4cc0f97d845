"""The layer: projections, the two mixtures that start as the identity, and a plain cache."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from attnkit.masks import Mask, causal, joined
from attnkit.mechanisms.talking_heads import cost, talking_heads_attention
from attnkit.positions import Rotary
from attnkit.projected import check_rotary
from attnkit.shapes import check_groups
from attnkit.spec import Cost, Sizes
from attnkit.state import TokenState, View


@dataclass(frozen=True)
class TalkingHeadsConfig:
    """A talking-heads attention layer.

    ``heads`` are those of queries; ``softmax_heads`` and ``value_heads`` are as many when None. Queries and keys have
    ``width / heads`` channels a head, values ``width / value_heads``. ``kv_heads`` None is a key head for each query
    head and a value head for each of ``value_heads``; a number is that of both. ``mask`` None is bidirectional.
    """

    width: int
    heads: int
    kv_heads: int | None = None
    softmax_heads: int | None = None
    value_heads: int | None = None
    rotary: Rotary | None = None
    qk_norm: bool = False
    mask: Mask | None = field(default_factory=causal)
    backend: str | None = None

    def __post_init__(self) -> None:
        if min(self.width, *self.numbers) < 1 or self.width % self.heads or self.width % self.numbers[2]:
            raise ValueError(
                f"TalkingHeadsConfig: got width {self.width} and {self.numbers} heads for queries, softmax and values, "
                f"expected at least 1 each and a width that heads of queries and values divide"
            )
        for heads, groups in zip(self.numbers[::2], self.groups, strict=True):
            check_groups("TalkingHeadsConfig", heads, groups)
        check_rotary("TalkingHeadsConfig", self.rotary, self.head_size)

    @property
    def numbers(self) -> tuple[int, int, int]:
        """Heads of queries, inside the softmax, of values."""
        inside, after = (self.heads if n is None else n for n in (self.softmax_heads, self.value_heads))
        return self.heads, inside, after

    @property
    def groups(self) -> tuple[int, int]:
        """Heads of keys and of values in the cache."""
        return (self.heads, self.numbers[2]) if self.kv_heads is None else (self.kv_heads, self.kv_heads)

    @property
    def head_size(self) -> int:
        return self.width // self.heads

    @property
    def value_size(self) -> int:
        return self.width // self.numbers[2]


class TalkingHeadsAttention(nn.Module):
    """Talking-heads attention on ``(b, n, width)``; ``forward`` for whole sequences, ``step`` through a state.

    Projections start as N(0, 1/width), mixtures as the identity, which is softmax attention; from one number of heads
    to another, as the even shares that come closest to it.
    """

    def __init__(self, config: TalkingHeadsConfig) -> None:
        super().__init__()
        self.config = c = config
        h, inside, after = c.numbers
        self.q = nn.Linear(c.width, c.width, bias=False)
        self.k = nn.Linear(c.width, c.groups[0] * c.head_size, bias=False)
        self.v = nn.Linear(c.width, c.groups[1] * c.value_size, bias=False)
        self.o = nn.Linear(c.width, c.width, bias=False)
        for linear in (self.q, self.k, self.v, self.o):
            nn.init.normal_(linear.weight, std=c.width**-0.5)
        self.mix_logits, self.mix_weights = (nn.Parameter(_even(*sizes)) for sizes in ((inside, h), (after, inside)))
        self.q_norm, self.k_norm = (nn.RMSNorm(c.head_size) if c.qk_norm else nn.Identity() for _ in range(2))

    def forward(self, x: Tensor, *, mask: Mask | None = None) -> Tensor:
        """Attend within ``x`` ``(b, n, width)``; returns the same shape.

        ``mask`` joins the layer's own, for what belongs to the batch: padding, documents.
        """
        return self._attend(*self._project(x, 0), joined(self.config.mask, mask))

    def state(
        self,
        batch: int,
        capacity: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> TokenState:
        """An empty state for ``capacity`` tokens: keys and values, whose numbers of heads may differ."""
        c = self.config
        if c.mask is None:
            raise ValueError("a bidirectional layer cannot decode: give it a causal mask")
        fields = {"k": (c.groups[0], c.head_size), "v": (c.groups[1], c.value_size)}
        return TokenState(batch, capacity, fields, dtype=dtype, device=device)

    def step(self, x: Tensor, state: TokenState) -> tuple[Tensor, TokenState]:
        """Feed the next token or tokens ``x`` ``(b, m, width)``; any split of a sequence gives ``forward``'s rows."""
        q, k, v = self._project(x, state.length)
        held = View(**state.append(k=k, v=v), length=state.length)
        view, mask = held.for_queries(self.config.mask, x.shape[1])
        return self._attend(q, view.k, view.v, mask), state

    def cost(self, m: int, n: int, *, batch: int = 1, dtype: torch.dtype = torch.float32) -> Cost:
        """What the attention of ``m`` new tokens over ``n`` takes, and the state that holds ``n``."""
        c = self.config
        return cost(
            Sizes(batch, c.heads, c.groups[0], m, n, c.head_size, c.value_size),
            softmax_heads=c.numbers[1],
            value_heads=c.numbers[2],
            value_groups=c.groups[1],
            mask=c.mask,
            itemsize=dtype.itemsize,
        )

    def _project(self, x: Tensor, start: int) -> tuple[Tensor, Tensor, Tensor]:
        c = self.config
        q, k = (y(x).unflatten(-1, (-1, c.head_size)).transpose(1, 2) for y in (self.q, self.k))
        v = self.v(x).unflatten(-1, (-1, c.value_size)).transpose(1, 2)
        q, k = self.q_norm(q), self.k_norm(k)
        if c.rotary is not None:
            positions = torch.arange(start, start + x.shape[1], device=x.device)
            q, k = c.rotary.rotate(q, positions), c.rotary.rotate(k, positions)
        return q, k, v

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask | None) -> Tensor:
        backend = self.config.backend
        o = talking_heads_attention(q, k, v, self.mix_logits, self.mix_weights, mask=mask, backend=backend)
        y: Tensor = self.o(o.transpose(1, 2).flatten(2))
        return y


def _even(rows: int, columns: int) -> Tensor:
    """The identity, stretched to ``(rows, columns)``: each row takes even shares of the columns at its height."""
    row, column = torch.arange(rows)[:, None], torch.arange(columns)
    meets = (row * columns // rows == column) | (column * rows // columns == row)
    return meets / meets.sum(1, keepdim=True)
