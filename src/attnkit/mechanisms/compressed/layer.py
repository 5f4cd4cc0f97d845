"""The layer of DeepSeek-V4: window alone (sliding), with chosen entries (CSA), or with all of few entries (HCA)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from attnkit.costs import compressed as cost
from attnkit.mechanisms.compressed import compressed_attention
from attnkit.mechanisms.compressed.compressor import Compressor, Indexer, linear, turned
from attnkit.mechanisms.compressed.weights import from_deepseek
from attnkit.positions import Rotary
from attnkit.spec import Cost, Sizes
from attnkit.state import Closed, CompressedState

RATES = {"csa": 4, "hca": 128}


@dataclass(frozen=True)
class CompressedConfig:
    """A layer of DeepSeek-V4, of one of three kinds.

    ``"sliding"`` sees the last ``window`` tokens; ``"csa"`` also the ``top`` entries that an indexer of ``index_heads``
    heads of ``index_size`` channels picks, entries of overlapping windows; ``"hca"`` also all entries, of windows that
    do not overlap. ``rate`` is the tokens of a window: 4 for CSA and 128 for HCA when None.

    ``head_size`` None is ``width / heads``: the channels of the one vector that is key and value to all heads.
    ``rotary`` turns the last ``rotary.head_size`` of them, and of the index heads'. Queries pass through ``query_rank``
    channels (``width / 2`` when None), and ``groups`` groups of heads through ``output_rank`` each (half of the group's
    when None). DeepSeek-V4-Flash is ``CompressedConfig(4096, 64, kind, head_size=512, query_rank=1024, groups=8,
    output_rank=1024, top=512, index_heads=64, index_size=128)``.
    """

    width: int
    heads: int
    kind: Literal["sliding", "csa", "hca"] = "csa"
    head_size: int | None = None
    window: int = 128
    rate: int | None = None
    top: int = 512
    rotary: Rotary | None = None
    query_rank: int | None = None
    groups: int = 1
    output_rank: int | None = None
    index_heads: int = 8
    index_size: int = 32
    eps: float = 1e-6
    backend: str | None = None

    def __post_init__(self) -> None:
        where = "CompressedConfig"
        if self.kind not in ("sliding", *RATES):
            raise ValueError(f"{where}: kind is {self.kind!r}, expected 'sliding', 'csa' or 'hca'")
        if self.heads < 1 or self.width < 1 or (self.head_size is None and self.width % self.heads):
            raise ValueError(
                f"{where}: got width {self.width} and {self.heads} heads, expected a width that heads divide, or a "
                f"head_size"
            )
        if self.groups < 1 or self.heads % self.groups:
            raise ValueError(f"{where}: got {self.heads} heads in {self.groups} groups, expected groups of equal size")
        names = ("size", "window", "tokens", "top", "index_heads", "index_size", "latent", "rank")
        sizes = {name: getattr(self, name) for name in names}
        if min(sizes.values()) < 1:
            raise ValueError(f"{where}: got {sizes}, expected at least 1 of each")
        if self.kind == "sliding" and self.rate is not None:
            raise ValueError(f"{where}: rate is {self.rate} for a sliding layer, expected None: it has no entries")
        if self.rotary is not None:
            least = min(self.size, self.index_size) if self.kind == "csa" else self.size
            if self.rotary.size != self.rotary.head_size or self.rotary.size > least:
                raise ValueError(
                    f"{where}: rotary is made for {self.rotary.size} of {self.rotary.head_size} channels, expected all "
                    f"of at most {least}: those that it turns, the last of a head"
                )
            if self.rotary.scaling is not None and self.rotary.scaling.attention_factor != 1:
                raise ValueError(
                    f"{where}: rotary multiplies by {self.rotary.scaling.attention_factor:.4g}, expected 1, so that "
                    f"turning back undoes it: as with YaRN(..., mscale_all=1)"
                )

    @property
    def size(self) -> int:
        return self.width // self.heads if self.head_size is None else self.head_size

    @property
    def tokens(self) -> int:
        """Tokens of an entry's window."""
        return RATES.get(self.kind, 1) if self.rate is None else self.rate

    @property
    def latent(self) -> int:
        return -(-self.width // 2) if self.query_rank is None else self.query_rank

    @property
    def rank(self) -> int:
        return -(-self.heads * self.size // (2 * self.groups)) if self.output_rank is None else self.output_rank


class CompressedAttention(nn.Module):
    """DeepSeek-V4's attention on ``(b, n, width)``; ``forward`` for whole sequences, ``step`` through a state.

    Projections start as N(0, 1 / inputs), sinks and the biases of places in a window as 0, norms as 1.
    """

    def __init__(self, config: CompressedConfig) -> None:
        super().__init__()
        self.config = c = config
        self.q_down, self.q_norm = linear(c.width, c.latent), nn.RMSNorm(c.latent, eps=c.eps)
        self.q_up = linear(c.latent, c.heads * c.size)
        self.head_norm = nn.RMSNorm(c.size, eps=c.eps, elementwise_affine=False)
        self.kv, self.kv_norm = linear(c.width, c.size), nn.RMSNorm(c.size, eps=c.eps)
        self.sink = nn.Parameter(torch.zeros(c.heads))
        self.compressor = Compressor(c.width, c.size, c.tokens, c.kind == "csa", c.eps) if c.kind != "sliding" else None
        self.indexer = (
            Indexer(c.width, c.latent, c.index_heads, c.index_size, c.tokens, c.eps) if c.kind == "csa" else None
        )
        inner = c.heads * c.size // c.groups
        self.mix = nn.Parameter(torch.randn(c.groups, c.rank, inner) * inner**-0.5)
        self.o = linear(c.groups * c.rank, c.width)

    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Take over the attention weights of a released model, named as in Hugging Face's ``DeepseekV4Attention``."""
        self.load_state_dict(from_deepseek(weights, self.config.groups))

    def forward(self, x: Tensor) -> Tensor:
        """Attend within ``x`` ``(b, n, width)``; returns the same shape."""
        q, latent, kv = self._project(x, 0)
        streams, rotary = self._streams(), self.config.rotary
        made = {name: part.entries(Closed(*part(x)), 0, rotary) for name, part in streams.items()}
        return self._attend(x, q, latent, kv, made, 0)

    def state(
        self,
        batch: int,
        capacity: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> CompressedState:
        """An empty state for ``capacity`` tokens: the window's vectors, entries, and tokens that wait for theirs."""
        c = self.config
        return CompressedState(
            batch,
            capacity,
            c.window,
            c.size,
            rate=c.tokens,
            streams={name: part.size for name, part in self._streams().items()},
            overlap=c.kind == "csa",
            dtype=dtype,
            device=device,
        )

    def step(self, x: Tensor, state: CompressedState) -> tuple[Tensor, CompressedState]:
        """Feed the next token or tokens ``x`` ``(b, m, width)``; any split of a sequence gives ``forward``'s rows."""
        start, streams = state.length, self._streams()
        q, latent, kv = self._project(x, start)
        fed = {name: part(x) for name, part in streams.items()}
        kinds = ("values", "gates")
        new = {f"{name}_{kind}": y for name, pair in fed.items() for kind, y in zip(kinds, pair, strict=True)}
        seen, closed = state.append(kv, **new)
        window = start // self.config.tokens
        made = {name: part.entries(closed[name], window, self.config.rotary) for name, part in streams.items()}
        return self._attend(x, q, latent, seen, state.extend(**made), start), state

    def cost(self, m: int, n: int, *, batch: int = 1, dtype: torch.dtype = torch.float32) -> Cost:
        """What the attention of ``m`` new tokens over ``n`` takes, and the state that holds ``n``."""
        c, csa = self.config, self.config.kind == "csa"
        return cost(
            Sizes(batch, c.heads, 1, m, n, c.size, c.size),
            window=c.window,
            rate=None if c.kind == "sliding" else c.tokens,
            top=c.top if csa else None,
            overlap=csa,
            index=(c.index_heads, c.index_size) if csa else None,
            itemsize=dtype.itemsize,
        )

    def _streams(self) -> dict[str, Compressor]:
        """What makes entries of tokens: those that are attended to, and those that are searched."""
        found = {} if self.compressor is None else {"entries": self.compressor}
        return found if self.indexer is None else found | {"index": self.indexer.keys}

    def _project(self, x: Tensor, start: int) -> tuple[Tensor, Tensor, Tensor]:
        """Queries ``(b, h, m, d)``, what they were made of ``(b, m, latent)``, and vectors ``(b, 1, m, d)``."""
        latent = self.q_norm(self.q_down(x))
        q = self.head_norm(self.q_up(latent).unflatten(-1, (self.config.heads, -1))).transpose(1, 2)
        positions = torch.arange(start, start + x.shape[1], device=x.device)
        kv = self.kv_norm(self.kv(x))[:, None]
        return turned(q, positions, self.config.rotary), latent, turned(kv, positions, self.config.rotary)

    def _attend(self, x: Tensor, q: Tensor, latent: Tensor, kv: Tensor, made: dict[str, Tensor], start: int) -> Tensor:
        c, entries, chosen = self.config, made.get("entries"), None
        positions = torch.arange(start, start + x.shape[1], device=x.device)
        if self.indexer is not None and made["index"].shape[2] > c.top:
            chosen = self.indexer.choose(x, latent, made["index"], start, c.rotary, c.top)
        o = compressed_attention(
            q,
            kv,
            entries,
            chosen,
            window=c.window,
            rate=None if entries is None else c.tokens,
            sink=self.sink,
            length=start + x.shape[1],
            backend=c.backend,
        )
        # Values were turned by where they stand; turning back by where the query stands leaves the distance.
        o = turned(o, -positions, c.rotary).transpose(1, 2).flatten(2).unflatten(-1, (c.groups, -1))
        y: Tensor = self.o(torch.einsum("bngi,gri->bngr", o, self.mix).flatten(2))
        return y
