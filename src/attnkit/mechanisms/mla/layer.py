"""The layer: low-rank projections with their norms, decoupled rotary, a state of latents; takes DeepSeek's weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor, nn

from attnkit.costs import mla as cost
from attnkit.masks import Mask, causal, joined
from attnkit.mechanisms.mla import mla_attention
from attnkit.positions import Rotary, YaRN
from attnkit.spec import Cost, Sizes
from attnkit.state import LatentState

NAMES = {
    "q.weight": "q_proj.weight",
    "q_a.weight": "q_a_proj.weight",
    "q_norm.weight": "q_a_layernorm.weight",
    "q_b.weight": "q_b_proj.weight",
    "kv_a.weight": "kv_a_proj_with_mqa.weight",
    "kv_norm.weight": "kv_a_layernorm.weight",
    "kv_b": "kv_b_proj.weight",
    "o.weight": "o_proj.weight",
}
"""Our names of weights, and those of DeepSeek's checkpoints."""


@dataclass(frozen=True)
class MLAConfig:
    """A latent attention layer.

    ``latent`` is the size of a token's latent (DeepSeek's ``kv_lora_rank``), ``query_latent`` that of queries
    (``q_lora_rank``), None for queries made of the input itself. A head's query and key have ``nope_size`` channels of
    its own and ``rope_size`` whose keys all heads share; ``rotary`` turns those, and None leaves them as they are
    (NoPE). ``scale`` None is ``(nope_size + rope_size) ** -0.5``, times what YaRN makes logits grow by.
    """

    width: int
    heads: int
    latent: int
    nope_size: int
    rope_size: int
    value_size: int
    query_latent: int | None = None
    rotary: Rotary | None = None
    scale: float | None = None
    eps: float = 1e-6
    mask: Mask | None = field(default_factory=causal)
    backend: str | None = None

    def __post_init__(self) -> None:
        name = type(self).__name__
        for size in ("width", "heads", "latent", "nope_size", "value_size"):
            if getattr(self, size) < 1:
                raise ValueError(f"{name}: {size} is {getattr(self, size)}, expected at least 1")
        if self.rope_size < 0 or (self.query_latent is not None and self.query_latent < 1):
            raise ValueError(
                f"{name}: rope_size is {self.rope_size} and query_latent {self.query_latent}, expected at least 0, and "
                f"at least 1 or None"
            )
        if self.rotary is not None and self.rotary.head_size != self.rope_size:
            raise ValueError(
                f"{name}: rotary is made for head size {self.rotary.head_size}, rope_size is {self.rope_size}"
            )

    @property
    def key_size(self) -> int:
        return self.nope_size + self.rope_size

    @property
    def logit_scale(self) -> float:
        """What multiplies the products of queries and keys."""
        if self.scale is not None:
            return self.scale
        scaling = self.rotary.scaling if self.rotary is not None else None
        factor: float = scaling.logit_factor if isinstance(scaling, YaRN) else 1.0
        return factor / math.sqrt(self.key_size)

    @classmethod
    def deepseek(cls, config: Mapping[str, Any]) -> Self:
        """The layer that a ``config.json`` of DeepSeek-V2, V3 or their kin describes.

        Raises ``NotImplementedError`` for biases and for scalings of rotary other than YaRN.
        """
        if config.get("attention_bias"):
            raise NotImplementedError("deepseek: attention_bias is true, expected projections without biases")
        return cls(**cls._deepseek(config))

    @classmethod
    def _deepseek(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "width": config["hidden_size"],
            "heads": config["num_attention_heads"],
            "latent": config["kv_lora_rank"],
            "query_latent": config.get("q_lora_rank"),
            "nope_size": config["qk_nope_head_dim"],
            "rope_size": config["qk_rope_head_dim"],
            "value_size": config["v_head_dim"],
            "rotary": deepseek_rotary(config),
        }


def deepseek_rotary(config: Mapping[str, Any]) -> Rotary:
    """How a ``config.json`` of DeepSeek's turns the rotary channels."""
    # Older files have rope_theta and rope_scaling, newer ones both in rope_parameters.
    rope = {"rope_theta": config.get("rope_theta", 10000.0)} | dict(config.get("rope_scaling") or {})
    rope |= config.get("rope_parameters") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "yarn"):
        raise NotImplementedError(f"deepseek: rotary is scaled by {kind!r}, expected 'yarn' or none")
    scaling = None
    if kind == "yarn":
        scaling = YaRN(
            rope["factor"],
            rope["original_max_position_embeddings"],
            rope.get("beta_fast") or 32.0,
            rope.get("beta_slow") or 1.0,
            mscale=rope.get("mscale") or 1.0,
            mscale_all=rope.get("mscale_all_dim") or 0.0,
        )
    neighbours = config.get("rope_interleave", True)
    return Rotary(
        config["qk_rope_head_dim"],
        rope["rope_theta"],
        style="interleaved" if neighbours else "half",
        scaling=scaling,
    )


class MLAttention(nn.Module):
    """Latent attention on ``(b, n, width)``; ``forward`` for whole sequences, ``step`` for decoding through a state.

    Projections start as N(0, 1 / inputs), so that scores start at unit scale, and norms as 1.
    """

    def __init__(self, config: MLAConfig) -> None:
        super().__init__()
        self.config = c = config
        queries, source = c.heads * c.key_size, c.query_latent
        self.q = nn.Linear(c.width, queries, bias=False) if source is None else None
        self.q_a = nn.Linear(c.width, source, bias=False) if source is not None else None
        self.q_norm = nn.RMSNorm(source, eps=c.eps) if source is not None else None
        self.q_b = nn.Linear(source, queries, bias=False) if source is not None else None
        self.kv_a = nn.Linear(c.width, c.latent + c.rope_size, bias=False)
        self.kv_norm = nn.RMSNorm(c.latent, eps=c.eps)
        self.kv_b = nn.Parameter(torch.randn(c.heads * (c.nope_size + c.value_size), c.latent) * c.latent**-0.5)
        self.o = nn.Linear(c.heads * c.value_size, c.width, bias=False)
        for linear in (self.q, self.q_a, self.q_b, self.kv_a, self.o):
            if linear is not None:
                nn.init.normal_(linear.weight, std=linear.in_features**-0.5)

    def forward(self, x: Tensor, *, mask: Mask | None = None) -> Tensor:
        """Attend within ``x`` ``(b, n, width)``; returns the same shape.

        ``mask`` joins the layer's own, for what belongs to the batch: padding, documents.
        """
        return self._attend(self._queries(self._source(x), 0), self._latents(x, 0), joined(self.config.mask, mask))

    def state(
        self,
        batch: int,
        capacity: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> LatentState:
        """An empty state for ``capacity`` tokens: a latent and a rotary key each, whatever the number of heads."""
        c = self.config
        if c.mask is None:
            raise ValueError("a bidirectional layer cannot decode: give it a causal mask")
        return LatentState(batch, capacity, c.latent, c.rope_size, dtype=dtype, device=device)

    def step(self, x: Tensor, state: LatentState) -> tuple[Tensor, LatentState]:
        """Feed the next token or tokens ``x`` ``(b, m, width)``; any split of a sequence gives ``forward``'s rows."""
        q = self._queries(self._source(x), state.length)
        held = state.append(latent=self._latents(x, state.length))
        return self._attend(q, held["latent"], self.config.mask), state

    def cost(self, m: int, n: int, *, batch: int = 1, dtype: torch.dtype = torch.float32) -> Cost:
        """What the attention of ``m`` new tokens over ``n`` takes, and the state that holds ``n``."""
        c = self.config
        sizes = Sizes(batch, c.heads, 1, m, n, c.key_size, c.value_size)
        return cost(sizes, latent=c.latent, rotary=c.rope_size, itemsize=dtype.itemsize)

    def load_deepseek(self, weights: Mapping[str, Tensor], prefix: str = "") -> None:
        """Take over the weights of an attention layer of DeepSeek-V2, V3 or their kin, as their checkpoints name them.

        ``prefix`` is what stands before ``kv_b_proj.weight`` in a whole model: ``model.layers.3.self_attn.``. Raises
        ``ValueError`` for a missing weight or one of another shape.
        """
        for ours, parameter in self.state_dict(keep_vars=True).items():
            theirs = prefix + self._deepseek_names()[ours]
            if theirs not in weights:
                raise ValueError(f"load_deepseek: there is no {theirs!r}, expected a tensor {tuple(parameter.shape)}")
            if weights[theirs].shape != parameter.shape:
                raise ValueError(
                    f"load_deepseek: {theirs} has shape {tuple(weights[theirs].shape)}, expected "
                    f"{tuple(parameter.shape)}: make the layer with MLAConfig.deepseek(config)"
                )
            with torch.no_grad():
                parameter.copy_(weights[theirs])

    def _deepseek_names(self) -> dict[str, str]:
        return NAMES

    def _source(self, x: Tensor) -> Tensor:
        """What queries are made of: their latents ``(b, m, query_latent)``, or the input."""
        if self.q_a is None or self.q_norm is None:
            return x
        y: Tensor = self.q_norm(self.q_a(x))
        return y

    def _queries(self, source: Tensor, start: int) -> Tensor:
        """Queries ``(b, h, m, key_size)`` of tokens from position ``start`` on, rotary channels turned and last."""
        c, linear = self.config, self.q if self.q_b is None else self.q_b
        assert linear is not None
        q = linear(source).unflatten(-1, (c.heads, c.key_size)).transpose(1, 2)
        return self._turned(q, c.nope_size, start)

    def _latents(self, x: Tensor, start: int) -> Tensor:
        """Latents and shared keys ``(b, 1, m, latent + rope_size)`` as the state keeps them."""
        c = self.config
        joined = self.kv_a(x)
        normed = self.kv_norm(joined[..., : c.latent]).to(joined.dtype)  # autocast leaves norms in float32
        return self._turned(torch.cat([normed, joined[..., c.latent :]], -1)[:, None], c.latent, start)

    def _up(self, q: Tensor) -> Tensor:
        """``kv_b`` as the function wants it, ``(h, nope_size + value_size, latent)`` in the queries' dtype."""
        up: Tensor = self.kv_b.to(q.dtype).unflatten(0, (self.config.heads, -1))
        return up

    def _turned(self, x: Tensor, first: int, start: int) -> Tensor:
        """``x`` ``(b, heads, m, size)`` with rotary on all channels from ``first`` on."""
        if self.config.rotary is None:
            return x
        positions = torch.arange(start, start + x.shape[2], device=x.device)
        return torch.cat([x[..., :first], self.config.rotary.rotate(x[..., first:], positions)], -1)

    def _attend(self, q: Tensor, latent: Tensor, mask: Mask | None) -> Tensor:
        c = self.config
        return self._out(mla_attention(q, latent, self._up(q), mask=mask, scale=c.logit_scale, backend=c.backend))

    def _out(self, o: Tensor) -> Tensor:
        y: Tensor = self.o(o.transpose(1, 2).flatten(2))
        return y
