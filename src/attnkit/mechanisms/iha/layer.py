"""The layer: projections, mixtures of heads and a state of pseudo keys and values around ``iha_attention``."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from attnkit.mechanisms.iha import cost, iha_attention, iha_attention_step
from attnkit.mechanisms.iha.virtual import Order, check_order, pseudo_tokens
from attnkit.positions import Rotary
from attnkit.projected import Projected, check_rotary
from attnkit.spec import Cost, Sizes
from attnkit.state import KVState, WindowState


@dataclass(frozen=True)
class InterleavedHeadConfig:
    """An interleaved head attention layer of ``pseudo`` pseudo tokens a token and head.

    ``causal`` and ``window`` (in tokens) are as in ``iha_attention``; ``causal`` None is bidirectional. ``separate``
    collapses each head's own pseudo tokens alone instead of mixing the heads again. ``rotary`` turns by the positions
    of pseudo tokens. ``qk_norm`` normalises queries and keys before they are mixed.
    """

    width: int
    heads: int
    pseudo: int = 2
    causal: Order | None = "flat"
    window: int | None = None
    separate: bool = False
    rotary: Rotary | None = None
    qk_norm: bool = False
    backend: str | None = None

    def __post_init__(self) -> None:
        where = "InterleavedHeadConfig"
        if self.heads < 1 or self.width < 1 or self.width % self.heads:
            raise ValueError(f"{where}: got width {self.width} and {self.heads} heads, expected a multiple of heads")
        if self.pseudo < 1:
            raise ValueError(f"{where}: pseudo is {self.pseudo}, expected at least 1 pseudo token a token")
        check_order(where, self.causal, self.window)
        check_rotary(where, self.rotary, self.head_size)

    @property
    def head_size(self) -> int:
        return self.width // self.heads


class InterleavedHeadAttention(Projected):
    """Interleaved head attention on ``(b, n, width)``; ``forward`` for whole sequences, ``step`` through a state.

    Projections start as N(0, 1/width). Every pseudo token starts as its own head, and the collapse as the mean of a
    head's own pseudo tokens.
    """

    def __init__(self, config: InterleavedHeadConfig) -> None:
        c = config
        super().__init__(c.width, c.heads, c.heads, c.head_size, qk_norm=c.qk_norm)  # pseudo tokens are what turns
        self.config = c
        own = torch.eye(c.heads)[..., None].expand(-1, -1, c.pseudo)
        self.mix_q, self.mix_k, self.mix_v = (nn.Parameter(own.clone()) for _ in range(3))
        mean = torch.ones(c.heads, c.pseudo) if c.separate else own.flatten(1)
        self.collapse = nn.Parameter(mean / c.pseudo)

    def forward(self, x: Tensor) -> Tensor:
        """Attend within ``x`` ``(b, n, width)``; returns the same shape."""
        c = self.config
        mixtures = (self.mix_q, self.mix_k, self.mix_v, self.collapse)
        o = iha_attention(
            *self._project(x, 0), *mixtures, causal=c.causal, window=c.window, rotary=c.rotary, backend=c.backend
        )
        return self._out(o)

    def state(
        self,
        batch: int,
        capacity: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> KVState | WindowState:
        """An empty state for ``capacity`` tokens, pseudo keys and values of each side by side; a ring in a window."""
        c = self.config
        if c.causal is None:
            raise ValueError("a bidirectional layer cannot decode: give it causal='flat' or causal='token'")
        size = c.pseudo * c.head_size
        if c.window is None or c.window >= capacity:
            return KVState(batch, c.heads, capacity, size, dtype=dtype, device=device)
        return WindowState(batch, c.heads, c.window, size, dtype=dtype, device=device)

    def step(self, x: Tensor, state: KVState | WindowState) -> tuple[Tensor, KVState | WindowState]:
        """Feed the next token or tokens ``x`` ``(b, m, width)``; any split of a sequence gives ``forward``'s rows."""
        c = self.config
        assert c.causal is not None, "state() has refused this layer"
        q, k, v = self._project(x, 0)
        keys = pseudo_tokens(k, self.mix_k, rotary=c.rotary, start=state.length)
        values = pseudo_tokens(v, self.mix_v)
        # Side by side in the channels of their token, pseudo tokens lie in memory as they do along the sequence.
        view = state.append(*(y.unflatten(2, (-1, c.pseudo)).flatten(3).to(x.dtype) for y in (keys, values)))
        keys, values = (y.unflatten(3, (c.pseudo, -1)).flatten(2, 3) for y in (view.k, view.v))
        o = iha_attention_step(
            q,
            keys,
            values,
            self.mix_q,
            self.collapse,
            causal=c.causal,
            window=c.window,
            rotary=c.rotary,
            positions=view.positions,
        )
        return self._out(o), state

    def cost(self, m: int, n: int, *, batch: int = 1, dtype: torch.dtype = torch.float32) -> Cost:
        """What the attention of ``m`` new tokens over ``n`` takes, and the state that holds ``n``."""
        c = self.config
        return cost(
            Sizes(batch, c.heads, c.heads, m, n, c.head_size, c.head_size),
            pseudo=c.pseudo,
            causal=c.causal,
            window=c.window,
            separate=c.separate,
            itemsize=dtype.itemsize,
        )
