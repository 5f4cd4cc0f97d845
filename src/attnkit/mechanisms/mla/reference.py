"""Latent attention as the paper writes it: raise the latents to keys and values of every head, then attend."""

from __future__ import annotations

import torch
from torch import Tensor

from attnkit.masks import Mask
from attnkit.mechanisms.mla.keys import mla_expand, parts
from attnkit.mechanisms.softmax import softmax_attention


def forward(q: Tensor, latent: Tensor, kv_b: Tensor, mask: Mask | None, scale: float) -> Tensor:
    wide = torch.promote_types(q.dtype, torch.float32)
    k, v = mla_expand(latent.to(wide), kv_b.to(wide), nope=parts(q, latent, kv_b)[0])
    o: Tensor = softmax_attention(q.to(wide), k, v, mask=mask, scale=scale, backend="reference")
    return o.to(q.dtype)
