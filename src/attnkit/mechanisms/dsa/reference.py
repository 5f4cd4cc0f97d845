"""DeepSeek sparse attention as the report writes it: score all pairs, hide all but the best keys of each query."""

from __future__ import annotations

import torch
from torch import Tensor

from attnkit.masks import explicit
from attnkit.mechanisms.dsa.indexer import unmoved
from attnkit.mechanisms.mla import mla_attention


def forward(
    q: Tensor, latent: Tensor, kv_b: Tensor, index_q: Tensor, index_k: Tensor, index_w: Tensor, top: int, scale: float
) -> Tensor:
    m, n = q.shape[2], latent.shape[2]
    wide = torch.promote_types(q.dtype, torch.float32)
    keys = index_k.detach().to(wide).repeat_interleave(index_q.shape[1] // index_k.shape[1], 1)
    products = torch.einsum("bjmi,bjni->bjmn", index_q.detach().to(wide), keys)
    scores = (index_w.detach().to(wide)[..., None] * products.relu()).sum(1)
    later = torch.arange(n, device=q.device) > torch.arange(n - m, n, device=q.device)[:, None]
    # A stable sort leaves equal scores in the order of their keys.
    order = scores.masked_fill(later, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    chosen = (order.argsort(-1) < top) & ~later
    o = mla_attention(q, latent, kv_b, mask=explicit(chosen), scale=scale, backend="reference")
    return unmoved(o, index_q, index_k, index_w)
