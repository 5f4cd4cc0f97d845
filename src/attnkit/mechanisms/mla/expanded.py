"""Keys and values of every head are made once for all queries: the form of prefill and training."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from attnkit.masks import Mask
from attnkit.mechanisms.mla.keys import mla_expand, parts
from attnkit.mechanisms.softmax import softmax_attention

FEW = 128
"""Keys whose weights may well be built at once."""


def forward(q: Tensor, latent: Tensor, kv_b: Tensor, mask: Mask | None, scale: float) -> Tensor:
    nope, _, e, _ = parts(q, latent, kv_b)
    dtype, wide = q.dtype, torch.promote_types(q.dtype, torch.float32)
    # What is formed stays in float32: rounding it would cost more than half precision's own budget.
    k, v = mla_expand(latent.to(wide), kv_b.to(wide), nope=nope)
    q = q.to(wide)
    if k.shape[2] > FEW and torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        # torch's kernel with a backward takes one size for keys and values; for two it builds all weights at once.
        size = max(k.shape[3], e)
        q, k, v = (pad(x, (0, size - x.shape[3])) for x in (q, k, v))
    o: Tensor = softmax_attention(q, k, v, mask=mask, scale=scale)
    return o[..., :e].to(dtype)
