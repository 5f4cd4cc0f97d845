"""The layer: one linear map a factor, rotary on the vectors that heads share, and a state of factors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from attnkit.mechanisms.tensor_product import cost, tensor_product_attention, tensor_product_attention_step
from attnkit.positions import Rotary
from attnkit.spec import Cost, Sizes
from attnkit.state import TokenState

# More new tokens than this form keys and values: the step's intermediate is R times the logits.
FEW = 8


@dataclass(frozen=True)
class TensorProductConfig:
    """A causal tensor product attention layer with ranks ``query_rank``, ``key_rank`` and ``value_rank``.

    ``rotary`` turns the vectors ``b`` of queries and keys, which is the same as turning their sums. ``qk_norm``
    normalises those vectors.
    """

    width: int
    heads: int
    query_rank: int = 6
    key_rank: int = 2
    value_rank: int = 2
    rotary: Rotary | None = None
    qk_norm: bool = False
    backend: str | None = None

    def __post_init__(self) -> None:
        if self.heads < 1 or self.width < 1 or self.width % self.heads:
            raise ValueError(
                f"TensorProductConfig: got width {self.width} and {self.heads} heads, expected a width that heads "
                f"divide"
            )
        if min(self.ranks) < 1:
            raise ValueError(f"TensorProductConfig: ranks are {self.ranks}, expected at least 1 each")
        if self.rotary is not None and self.rotary.head_size != self.head_size:
            raise ValueError(
                f"TensorProductConfig: rotary is made for head size {self.rotary.head_size}, heads have "
                f"{self.head_size}"
            )

    @property
    def ranks(self) -> tuple[int, int, int]:
        return self.query_rank, self.key_rank, self.value_rank

    @property
    def head_size(self) -> int:
        return self.width // self.heads


class TensorProductAttention(nn.Module):
    """Tensor product attention on ``(b, n, width)``; ``forward`` for whole sequences, ``step`` through a state.

    Factor maps start as Xavier's uniform, as in the paper; the output map, which the paper starts at 0, as
    N(0, 1/width), and a ``Decoder`` starts it at 0.
    """

    def __init__(self, config: TensorProductConfig) -> None:
        super().__init__()
        self.config = c = config
        self.a_q, self.a_k, self.a_v = (nn.Linear(c.width, rank * c.heads, bias=False) for rank in c.ranks)
        self.b_q, self.b_k, self.b_v = (nn.Linear(c.width, rank * c.head_size, bias=False) for rank in c.ranks)
        self.o = nn.Linear(c.width, c.width, bias=False)
        for linear in (self.a_q, self.a_k, self.a_v, self.b_q, self.b_k, self.b_v):
            nn.init.xavier_uniform_(linear.weight)
        nn.init.normal_(self.o.weight, std=c.width**-0.5)
        self.q_norm, self.k_norm = (nn.RMSNorm(c.head_size) if c.qk_norm else nn.Identity() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """Attend within ``x`` ``(b, n, width)``; returns the same shape."""
        return self._out(tensor_product_attention(*self._factors(x, 0), backend=self.config.backend))

    def state(
        self,
        batch: int,
        capacity: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> TokenState:
        """An empty state for ``capacity`` tokens: the factors of their keys and values."""
        c = self.config
        fields = {
            "a_k": (c.heads, c.key_rank),
            "b_k": (c.key_rank, c.head_size),
            "a_v": (c.heads, c.value_rank),
            "b_v": (c.value_rank, c.head_size),
        }
        return TokenState(batch, capacity, fields, dtype=dtype, device=device)

    def step(self, x: Tensor, state: TokenState) -> tuple[Tensor, TokenState]:
        """Feed the next token or tokens ``x`` ``(b, m, width)``; any split of a sequence gives ``forward``'s rows."""
        a_q, b_q, a_k, b_k, a_v, b_v = self._factors(x, state.length)
        held = state.append(a_k=a_k, b_k=b_k, a_v=a_v, b_v=b_v)
        form = tensor_product_attention_step if x.shape[1] <= FEW else tensor_product_attention
        return self._out(form(a_q, b_q, held["a_k"], held["b_k"], held["a_v"], held["b_v"])), state

    def cost(self, m: int, n: int, *, batch: int = 1, dtype: torch.dtype = torch.float32) -> Cost:
        """What the attention of ``m`` new tokens over ``n`` takes, and the state that holds ``n``."""
        c = self.config
        sizes = Sizes(batch, c.heads, c.heads, m, n, c.head_size, c.head_size)
        return cost(sizes, ranks=c.ranks, itemsize=dtype.itemsize)

    def _factors(self, x: Tensor, start: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """``a_q, b_q, a_k, b_k, a_v, b_v`` of tokens from position ``start`` on, as the function takes them."""
        c = self.config
        a_q, a_k, a_v = (y(x).unflatten(-1, (c.heads, -1)).transpose(1, 2) for y in (self.a_q, self.a_k, self.a_v))
        b_q, b_k, b_v = (y(x).unflatten(-1, (-1, c.head_size)).transpose(1, 2) for y in (self.b_q, self.b_k, self.b_v))
        b_q, b_k = self.q_norm(b_q), self.k_norm(b_k)
        if c.rotary is not None:
            positions = torch.arange(start, start + x.shape[1], device=x.device)
            b_q, b_k = c.rotary.rotate(b_q, positions), c.rotary.rotate(b_k, positions)
        return a_q, b_q, a_k, b_k, a_v, b_v

    def _out(self, o: Tensor) -> Tensor:
        y: Tensor = self.o(o.transpose(1, 2).flatten(2))
        return y
