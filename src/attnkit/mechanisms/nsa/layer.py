"""The layer: three keys and values a token, the network that compresses blocks, gates, and a decoding state."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu

from attnkit.mechanisms.nsa import cost, nsa_attention, nsa_attention_step
from attnkit.mechanisms.nsa.blocks import Blocks, check, windows
from attnkit.positions import Rotary
from attnkit.projected import Heads, check_rotary
from attnkit.spec import Cost, Sizes
from attnkit.state import KVState, PooledState, View, WindowState


@dataclass(frozen=True)
class NsaConfig(Heads):
    """An NSA layer; ``length`` to ``causal`` are those of ``nsa_attention``.

    ``kv_heads`` None is one KV head a query head; all query heads of one select the same blocks. ``hidden`` is the
    width of the network that compresses a block, the size of a head when None.
    """

    length: int = 32
    stride: int = 16
    block: int = 64
    selected: int = 16
    window: int = 512
    causal: bool = True
    hidden: int | None = None
    rotary: Rotary | None = None
    qk_norm: bool = False
    backend: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        blocks = Blocks(self.length, self.stride, self.block, self.selected)
        check("NsaConfig", blocks, self.window, self.causal)
        if self.hidden is not None and self.hidden < 1:
            raise ValueError(f"NsaConfig: hidden is {self.hidden}, expected at least 1")
        check_rotary("NsaConfig", self.rotary, self.head_size)


class Compression(nn.Module):
    """Blocks of tokens ``(b, g, c, length, d)`` to one vector each ``(b, g, c, d)``: a network of one hidden layer.

    A learned embedding of the places within a block is added first. Weights start as N(0, 1 / inputs).
    """

    def __init__(self, length: int, size: int, hidden: int) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.empty(length, size))
        self.up = nn.Linear(length * size, hidden, bias=False)
        self.down = nn.Linear(hidden, size, bias=False)
        for weight in (self.position, self.up.weight, self.down.weight):
            nn.init.normal_(weight, std=weight.shape[1] ** -0.5)

    def forward(self, blocks: Tensor) -> Tensor:
        found: Tensor = self.down(gelu(self.up((blocks + self.position).flatten(-2))))
        return found


class NsaAttention(nn.Module):
    """NSA on ``(b, n, width)``; ``forward`` for whole sequences, ``step`` for decoding through a state.

    Projections start as N(0, 1/width), gates around 1/2.
    """

    def __init__(self, config: NsaConfig) -> None:
        super().__init__()
        self.config = c = config
        keys = c.groups * c.head_size
        self.q = nn.Linear(c.width, c.width, bias=False)
        self.k, self.v = (nn.Linear(c.width, keys, bias=False) for _ in range(2))
        self.raw_k, self.raw_v = (nn.Linear(c.width, keys, bias=False) for _ in range(2))
        self.window_k, self.window_v = (nn.Linear(c.width, keys, bias=False) for _ in range(2))
        self.gate = nn.Linear(c.width, 3 * c.heads)
        self.o = nn.Linear(c.width, c.width, bias=False)
        for linear in (self.q, *self._keys(), *self._values(), self.gate, self.o):
            nn.init.normal_(linear.weight, std=c.width**-0.5)
        nn.init.zeros_(self.gate.bias)
        hidden = c.head_size if c.hidden is None else c.hidden
        self.compress_k, self.compress_v = (Compression(c.length, c.head_size, hidden) for _ in range(2))
        self.q_norm, self.k_norm = (nn.RMSNorm(c.head_size) if c.qk_norm else nn.Identity() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """Attend within ``x`` ``(b, n, width)``; returns the same shape."""
        c, (q, keys, values) = self.config, self._project(x, 0)
        compressed = self._compress(keys[1], values[1])
        o = nsa_attention(
            q,
            keys[0],
            values[0],
            *compressed,
            keys[2],
            values[2],
            self._gates(x),
            length=c.length,
            stride=c.stride,
            block=c.block,
            selected=c.selected,
            window=c.window,
            causal=c.causal,
            backend=c.backend,
        )
        return self._out(o)

    def state(
        self,
        batch: int,
        capacity: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> PooledState:
        """An empty state for ``capacity`` tokens: all of the selected branch, two rings, and the compressed blocks."""
        c = self.config
        if not c.causal:
            raise ValueError("a bidirectional layer cannot decode: give it causal=True")
        shape = c.groups, c.head_size
        parts: dict[str, KVState | WindowState] = {
            "selected": KVState(batch, c.groups, capacity, c.head_size, dtype=dtype, device=device),
            "window": WindowState(batch, c.groups, min(capacity, c.window), c.head_size, dtype=dtype, device=device),
            "raw": WindowState(batch, c.groups, min(capacity, c.length), c.head_size, dtype=dtype, device=device),
        }
        fields = {"k": shape, "v": shape}
        return PooledState(batch, capacity, parts, fields, size=c.length, stride=c.stride, dtype=dtype, device=device)

    def step(self, x: Tensor, state: PooledState) -> tuple[Tensor, PooledState]:
        """Feed the next token or tokens ``x`` ``(b, m, width)``; any split of a sequence gives ``forward``'s rows."""
        c, (q, keys, values) = self.config, self._project(x, state.length)
        token, raw, near = (
            state.parts[name].append(key, value)
            for name, key, value in zip(("selected", "raw", "window"), keys, values, strict=True)
        )
        if due := state.due():
            k, v = self._compress(*_since(raw, due.start * c.stride))
            state.pooled.append(k=k, v=v)
        compressed = state.pooled.view()
        o = nsa_attention_step(
            q,
            token.k,
            token.v,
            compressed["k"],
            compressed["v"],
            near.k,
            near.v,
            self._gates(x),
            length=c.length,
            stride=c.stride,
            block=c.block,
            selected=c.selected,
            window=c.window,
        )
        return self._out(o), state

    def cost(self, m: int, n: int, *, batch: int = 1, dtype: torch.dtype = torch.float32) -> Cost:
        """What the attention of ``m`` new tokens over ``n`` takes, and the state that holds ``n``."""
        c = self.config
        sizes = Sizes(batch, c.heads, c.groups, m, n, c.head_size, c.head_size)
        return cost(
            sizes,
            length=c.length,
            stride=c.stride,
            block=c.block,
            selected=c.selected,
            window=c.window,
            causal=c.causal,
            itemsize=dtype.itemsize,
        )

    def _keys(self) -> tuple[nn.Linear, nn.Linear, nn.Linear]:
        return self.k, self.raw_k, self.window_k

    def _values(self) -> tuple[nn.Linear, nn.Linear, nn.Linear]:
        return self.v, self.raw_v, self.window_v

    def _project(self, x: Tensor, start: int) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """The queries, and keys and values for selecting, compressing and the window, keys with their positions."""
        c, positions = self.config, torch.arange(start, start + x.shape[1], device=x.device)

        def heads(linear: nn.Linear, norm: nn.Module) -> Tensor:
            y: Tensor = norm(linear(x).unflatten(-1, (-1, c.head_size)).transpose(1, 2))
            return y if c.rotary is None else c.rotary.rotate(y, positions)

        q, keys = heads(self.q, self.q_norm), [heads(linear, self.k_norm) for linear in self._keys()]
        return q, keys, [y(x).unflatten(-1, (-1, c.head_size)).transpose(1, 2) for y in self._values()]

    def _compress(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        c = self.config
        return self.compress_k(windows(k, c.length, c.stride)), self.compress_v(windows(v, c.length, c.stride))

    def _gates(self, x: Tensor) -> Tensor:
        """Gates ``(b, h, m, 3)``."""
        gates: Tensor = torch.sigmoid(self.gate(x)).unflatten(-1, (-1, 3)).transpose(1, 2)
        return gates

    def _out(self, o: Tensor) -> Tensor:
        y: Tensor = self.o(o.transpose(1, 2).flatten(2))
        return y


def _since(view: View, first: int) -> tuple[Tensor, Tensor]:
    """Keys and values of the tokens from position ``first`` on, in their order, which is not that of a ring's slots."""
    assert view.positions is not None
    order = view.positions.argsort()
    tokens = order[view.positions[order] >= first]
    return view.k[:, :, tokens], view.v[:, :, tokens]
