"""The layer of RetNet and of MiniMax's lightning attention: projections, positions, norm and gate around retention."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from attnkit.costs import retention as cost
from attnkit.mechanisms.retention import retention_attention, retention_attention_step
from attnkit.mechanisms.retention.decays import minimax_decays
from attnkit.positions import Rotary
from attnkit.projected import check_rotary
from attnkit.spec import Cost, Sizes
from attnkit.state import RecurrentState

# What Hugging Face's MiniMax saves beside its weights: tables made of the slopes.
TABLES = ("slope_rate", "query_decay", "key_decay", "diagonal_decay")


@dataclass(frozen=True)
class RetentionConfig:
    """A retention layer.

    ``log_decay`` has one number a head. Keys have ``head_size`` channels, width / heads when None, and values
    ``value_size``, as many when None. ``activation`` is applied to queries, keys and values. ``norm`` of the result is
    RMS, over each head without weights or over all heads with a weight a channel. The ``gate`` multiplies what was
    normalised by ``silu(W x)`` ("swish") or ``sigmoid(W x)``. ``scale`` is ``head_size ** -0.5`` when None.
    """

    width: int
    heads: int
    log_decay: tuple[float, ...]
    head_size: int | None = None
    value_size: int | None = None
    rotary: Rotary | None = None
    activation: Literal["silu"] | None = None
    norm: Literal["head", "all"] = "head"
    gate: Literal["swish", "sigmoid"] = "swish"
    scale: float | None = None
    backend: str | None = None

    def __post_init__(self) -> None:
        if self.heads < 1 or self.width < 1 or (self.head_size is None and self.width % self.heads):
            raise ValueError(
                f"RetentionConfig: got width {self.width} and {self.heads} heads, expected a width that heads divide, "
                f"or head_size="
            )
        if len(self.log_decay) != self.heads or max(self.log_decay) > 0:
            raise ValueError(
                f"RetentionConfig: log_decay is {self.log_decay}, expected a number of at most 0 for each of "
                f"{self.heads} heads"
            )
        check_rotary("RetentionConfig", self.rotary, self.key_size)
        if self.activation not in (None, "silu"):
            raise ValueError(f"RetentionConfig: activation is {self.activation!r}, expected 'silu' or None")
        if self.norm not in ("head", "all") or self.gate not in ("swish", "sigmoid"):
            raise ValueError(
                f"RetentionConfig: norm is {self.norm!r} and gate {self.gate!r}, expected 'head' or 'all', and 'swish' "
                f"or 'sigmoid'"
            )

    @property
    def key_size(self) -> int:
        return self.width // self.heads if self.head_size is None else self.head_size

    @property
    def values(self) -> int:
        """Channels of a head's values."""
        return self.key_size if self.value_size is None else self.value_size


class RetentionAttention(nn.Module):
    """Retention on ``(b, n, width)``; ``forward`` for whole sequences, ``step`` for decoding through a state.

    Projections start as N(0, 1/width).
    """

    def __init__(self, config: RetentionConfig) -> None:
        super().__init__()
        self.config = c = config
        inner = c.heads * c.values
        self.q, self.k = (nn.Linear(c.width, c.heads * c.key_size, bias=False) for _ in range(2))
        self.v, self.gate = (nn.Linear(c.width, inner, bias=False) for _ in range(2))
        self.o = nn.Linear(inner, c.width, bias=False)
        for linear in (self.q, self.k, self.v, self.gate, self.o):
            nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
        each = c.norm == "head"
        self.norm = nn.RMSNorm(c.values if each else inner, eps=1e-6, elementwise_affine=not each)

    @classmethod
    def from_minimax(
        cls, weights: Mapping[str, Tensor], *, heads: int, layer: int, layers: int, backend: str | None = None
    ) -> RetentionAttention:
        """The layer with the weights of Hugging Face's ``MiniMaxLightningAttention``, number ``layer`` of ``layers``.

        ``weights`` are named as in that module's ``state_dict``: ``qkv_proj``, ``output_gate``, ``norm``, ``out_proj``.
        Raises ``ValueError`` for other names or sizes, and where saved slopes are those of another layer.
        """
        wanted = {f"{name}.weight" for name in ("qkv_proj", "output_gate", "norm", "out_proj")}
        if weights.keys() - set(TABLES) != wanted:
            raise ValueError(f"from_minimax: got weights {sorted(weights)}, expected {sorted(wanted)}")
        rows, width = weights["qkv_proj.weight"].shape
        if rows % (3 * heads):
            raise ValueError(f"from_minimax: qkv_proj has {rows} rows, expected a multiple of 3 times {heads} heads")
        decays = minimax_decays(heads, layer, layers)
        if (slopes := weights.get("slope_rate")) is not None:
            ours = torch.tensor(decays, dtype=torch.float64)
            if slopes.numel() != heads or not torch.allclose(-slopes.flatten().double().cpu(), ours, rtol=1e-2):
                raise ValueError(
                    f"from_minimax: slope_rate starts with {slopes.flatten()[0]:.6g}, expected {-ours[0]:.6g} for "
                    f"layer {layer} of {layers} with {heads} heads: say which layer it is"
                )
        made = cls(
            RetentionConfig(
                width,
                heads,
                decays,
                head_size=rows // (3 * heads),
                activation="silu",
                norm="all",
                gate="sigmoid",
                scale=1.0,
                backend=backend,
            )
        )
        # The rows of each head are its query, its key and its value, one after the other.
        q, k, v = (x.flatten(0, 1) for x in weights["qkv_proj.weight"].view(heads, 3, -1, width).unbind(1))
        named = {"q": q, "k": k, "v": v, "gate": weights["output_gate.weight"], "o": weights["out_proj.weight"]}
        named["norm"] = weights["norm.weight"]
        made.load_state_dict({f"{name}.weight": x for name, x in named.items()})
        return made.to(q.device, q.dtype)

    def forward(self, x: Tensor, *, keep: Tensor | None = None) -> Tensor:
        """Attend within ``x`` ``(b, n, width)``; returns the same shape. ``keep`` (b, n) is False for padding."""
        c = self.config
        q, k, v = self._project(x, _positions(x, keep))
        o = retention_attention(q, k, v, self._decays(q), scale=c.scale, keep=keep, backend=c.backend)
        return self._out(x, o)

    def state(
        self,
        batch: int,
        capacity: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> RecurrentState:
        """An empty state, of one size whatever ``capacity`` is; with rotary it counts each sequence's tokens."""
        c = self.config
        fields: dict[str, tuple[int, ...]] = {"state": (c.heads, c.key_size, c.values)}
        fields |= {"seen": (1,)} if c.rotary is not None else {}
        return RecurrentState(batch, fields, dtype=dtype, device=device)

    def step(self, x: Tensor, state: RecurrentState, *, keep: Tensor | None = None) -> tuple[Tensor, RecurrentState]:
        """Feed the next token or tokens ``x`` ``(b, m, width)``; any split of a sequence gives ``forward``'s rows."""
        held = state.view()
        positions = _positions(x, keep)
        if self.config.rotary is not None:
            added = x.shape[1] if keep is None else keep.sum(-1, keepdim=True)
            positions = positions + held["seen"].long()
            held["seen"] = held["seen"] + added
        q, k, v = self._project(x, positions)
        o, held["state"] = retention_attention_step(
            q, k, v, self._decays(q), held["state"], scale=self.config.scale, keep=keep
        )
        state.advance(x.shape[1], **held)
        return self._out(x, o), state

    def cost(self, m: int, n: int, *, batch: int = 1, dtype: torch.dtype = torch.float32) -> Cost:
        """What ``m`` new tokens after ``n - m`` take, and the state."""
        c = self.config
        found = cost(Sizes(batch, c.heads, c.heads, m, n, c.key_size, c.values), itemsize=dtype.itemsize)
        counted = 4 if c.rotary is not None else 0
        return Cost(found.flops, found.bytes, 0, found.state_bytes_fixed + counted)

    def _decays(self, q: Tensor) -> Tensor:
        """In the dtype that sums have, whatever the weights were cast to."""
        return torch.tensor(self.config.log_decay, dtype=torch.promote_types(q.dtype, torch.float32), device=q.device)

    def _project(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        c = self.config
        q, k, v = (y(x) if c.activation is None else silu(y(x)) for y in (self.q, self.k, self.v))
        q, k, v = (y.unflatten(-1, (c.heads, -1)).transpose(1, 2) for y in (q, k, v))
        if c.rotary is not None:
            q, k = c.rotary.rotate(q, positions), c.rotary.rotate(k, positions)
        return q, k, v

    def _out(self, x: Tensor, o: Tensor) -> Tensor:
        c = self.config
        mixed = o.transpose(1, 2)
        mixed = self.norm(mixed).flatten(2) if c.norm == "head" else self.norm(mixed.flatten(2))
        y: Tensor = self.o(mixed * (silu(self.gate(x)) if c.gate == "swish" else torch.sigmoid(self.gate(x))))
        return y


def _positions(x: Tensor, keep: Tensor | None) -> Tensor:
    """Positions (b, n) of tokens among those that are kept, or (n,) of all."""
    if keep is None:
        return torch.arange(x.shape[1], device=x.device)
    return keep.cumsum(-1) - 1
