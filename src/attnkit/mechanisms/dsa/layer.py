"""The layer: latent attention's, with an indexer beside it that learns from a loss of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from attnkit.costs import dsa as cost
from attnkit.masks import Mask, causal
from attnkit.mechanisms.dsa import dsa_attention, dsa_sparse_loss, dsa_warmup_loss
from attnkit.mechanisms.dsa.losses import beside
from attnkit.mechanisms.mla import MLAConfig, MLAttention
from attnkit.spec import Cost, Sizes
from attnkit.state import LatentState

NAMES = {
    "index_q.weight": "indexer.wq_b.weight",
    "index_k.weight": "indexer.wk.weight",
    "index_norm.weight": "indexer.k_norm.weight",
    "index_norm.bias": "indexer.k_norm.bias",
    "index_w.weight": "indexer.weights_proj.weight",
}
"""Our names of the indexer's weights, and those of DeepSeek's checkpoints."""


@dataclass(frozen=True)
class DSAConfig(MLAConfig):
    """A DeepSeek sparse attention layer; beside what it has of latent attention:

    ``index_heads`` queries of ``index_size`` channels choose ``top`` keys. ``rotary`` turns their first ``rope_size``
    channels as well, in pairs of ``index_style`` (V3.2's are halves while its attention's are neighbours; GLM-5 has
    neighbours in both). ``index_loss`` multiplies the gradient of ``dsa_sparse_loss`` that training adds, 0 for none:
    without it, the indexer stays as it was made.
    """

    index_heads: int = 64
    index_size: int = 128
    top: int = 2048
    index_style: Literal["half", "interleaved"] = "half"
    index_loss: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mask != causal():
            raise ValueError(f"DSAConfig: mask is {self.mask!r}, expected causal(): the indexer knows no other")
        if self.index_heads < 1 or self.index_size < max(1, self.rope_size) or self.top < 1:
            raise ValueError(
                f"DSAConfig: got {self.index_heads} index heads of {self.index_size} channels and top {self.top}, "
                f"expected at least 1 head, {max(1, self.rope_size)} channels (rope_size) and 1 key"
            )

    @classmethod
    def _deepseek(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        index = {"index_heads": "index_n_heads", "index_size": "index_head_dim", "top": "index_topk"}
        # GLM-5's file does not say so, but its indexer pairs neighbours.
        style = {"index_style": "interleaved"} if config.get("model_type") == "glm_moe_dsa" else {}
        return super()._deepseek(config) | {ours: config[theirs] for ours, theirs in index.items()} | style


class DSAttention(MLAttention):
    """DeepSeek sparse attention on ``(b, n, width)``; ``forward`` for whole sequences, ``step`` through a state.

    The indexer sees its input detached. While training, the backward of ``forward`` adds the gradient of the indexer's
    own loss to its weights, and to nothing else. Everything starts as in latent attention.
    """

    config: DSAConfig

    def __init__(self, config: DSAConfig) -> None:
        super().__init__(config)
        c, source = config, config.width if config.query_latent is None else config.query_latent
        self.index_q = nn.Linear(source, c.index_heads * c.index_size, bias=False)
        self.index_k = nn.Linear(c.width, c.index_size, bias=False)
        self.index_norm = nn.LayerNorm(c.index_size, eps=c.eps)
        self.index_w = nn.Linear(c.width, c.index_heads, bias=False)
        for linear in (self.index_q, self.index_k, self.index_w):
            nn.init.normal_(linear.weight, std=linear.in_features**-0.5)

    def forward(self, x: Tensor, *, mask: Mask | None = None) -> Tensor:
        """Attend within ``x`` ``(b, n, width)``; returns the same shape. ``mask`` has to be None."""
        if mask is not None:
            raise NotImplementedError(f"DSAttention got mask {mask!r}, expected none: feed documents one by one")
        c, (main, index) = self.config, self._projected(x)
        o = self._sparse(main, index)
        if self.training and torch.is_grad_enabled() and c.index_loss:
            loss = dsa_sparse_loss(*(y.detach() for y in main), *index, top=c.top, scale=c.logit_scale)
            o = beside(o, c.index_loss * loss)
        return self._out(o)

    def loss(self, x: Tensor, *, dense: bool = False) -> Tensor:
        """The indexer's loss on ``x`` ``(b, n, width)``, a scalar: ``dsa_warmup_loss`` if ``dense``.

        Its gradient reaches the indexer's weights only.
        """
        c, (main, index) = self.config, self._projected(x)
        if dense:
            return dsa_warmup_loss(*(y.detach() for y in main), *index, scale=c.logit_scale)
        return dsa_sparse_loss(*(y.detach() for y in main), *index, top=c.top, scale=c.logit_scale)

    def state(
        self,
        batch: int,
        capacity: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> LatentState:
        """An empty state for ``capacity`` tokens: a latent, a rotary key and an index key each."""
        c = self.config
        return LatentState(batch, capacity, c.latent, c.rope_size, index=c.index_size, dtype=dtype, device=device)

    def step(self, x: Tensor, state: LatentState) -> tuple[Tensor, LatentState]:
        """Feed the next token or tokens ``x`` ``(b, m, width)``; any split of a sequence gives ``forward``'s rows."""
        (q, latent, kv_b), (index_q, index_k, index_w) = self._projected(x, state.length)
        held = state.append(latent=latent, index=index_k)
        return self._out(self._sparse((q, held["latent"], kv_b), (index_q, held["index"], index_w))), state

    def cost(self, m: int, n: int, *, batch: int = 1, dtype: torch.dtype = torch.float32) -> Cost:
        """What the attention of ``m`` new tokens over ``n`` takes, and the state that holds ``n``."""
        c = self.config
        sizes = Sizes(batch, c.heads, 1, m, n, c.key_size, c.value_size)
        index = {"top": c.top, "index": c.index_size, "index_heads": c.index_heads}
        return cost(sizes, latent=c.latent, rotary=c.rope_size, itemsize=dtype.itemsize, **index)

    def _deepseek_names(self) -> dict[str, str]:
        return super()._deepseek_names() | NAMES

    def _projected(self, x: Tensor, start: int = 0) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[Tensor, ...]]:
        """Arguments of ``dsa_attention``: latent attention's three and the indexer's three."""
        source = self._source(x)
        q = self._queries(source, start)
        return (q, self._latents(x, start), self._up(q)), self._index(x.detach(), source.detach(), start)

    def _index(self, x: Tensor, source: Tensor, start: int) -> tuple[Tensor, Tensor, Tensor]:
        c = self.config
        q = self.index_q(source).unflatten(-1, (c.index_heads, c.index_size)).transpose(1, 2)
        k = self.index_norm(self.index_k(x))[:, None].to(q.dtype)  # autocast leaves norms in float32
        if c.rotary is not None:
            turning = replace(c.rotary, head_size=c.index_size, rotary_size=c.rope_size, style=c.index_style)
            positions = torch.arange(start, start + x.shape[1], device=x.device)
            q, k = turning.rotate(q, positions), turning.rotate(k, positions)
        # relu(a q k) = a relu(q k), so the scale of the products goes into the weights.
        wide = torch.promote_types(x.dtype, torch.float32)
        w = self.index_w(x).to(wide).mT * (c.index_heads * c.index_size) ** -0.5
        return q, k, w

    def _sparse(self, main: tuple[Tensor, Tensor, Tensor], index: tuple[Tensor, ...]) -> Tensor:
        c = self.config
        return dsa_attention(*main, *(y.detach() for y in index), top=c.top, scale=c.logit_scale, backend=c.backend)
