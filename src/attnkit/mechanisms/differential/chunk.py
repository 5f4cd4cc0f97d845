"""Two softmax attentions, each on its half of the channels: fast kernels run them, and neither builds all weights.

In float32 at least: a difference of two results already rounded to half precision has lost its digits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnkit.masks import Mask
from attnkit.mechanisms.softmax import softmax_attention


def forward(q: Tensor, k: Tensor, v: Tensor, share: Tensor, mask: Mask | None, scale: float) -> Tensor:
    work, d = torch.promote_types(q.dtype, torch.float32), q.shape[3] // 2
    queries, keys, values = q.to(work), k.to(work), v.to(work)
    first = softmax_attention(queries[..., :d], keys[..., :d], values, mask=mask, scale=scale)
    second = softmax_attention(queries[..., d:], keys[..., d:], values, mask=mask, scale=scale)
    o: Tensor = torch.addcmul(first, share.to(work)[:, None, None], second, value=-1)
    return o.to(q.dtype)
