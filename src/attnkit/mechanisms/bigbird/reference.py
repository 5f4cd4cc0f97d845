"""BigBird attention as the paper writes it: softmax attention under a dense mask made of blocks."""

from __future__ import annotations

import torch
from torch import Tensor

from attnkit.masks import bigbird_layout
from attnkit.mechanisms.softmax import softmax_attention


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    random_blocks: Tensor,
    block: int,
    window: int,
    keep: Tensor,
    scale: float,
) -> Tensor:
    of = torch.arange(q.shape[2], device=q.device) // block
    layout = bigbird_layout(random_blocks, window)
    sees = layout[None, :, of[:, None], of] & keep[:, None, None]
    o: Tensor = softmax_attention(q, k, v, mask=sees, scale=scale, backend="reference")
    return o.masked_fill(~keep[:, None, :, None], 0.0)
