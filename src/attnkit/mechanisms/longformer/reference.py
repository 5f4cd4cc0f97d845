"""Longformer attention as the paper writes it: a dense softmax for local rows, another for global ones."""

from __future__ import annotations

import torch
from torch import Tensor

from attnkit.mechanisms.longformer.rows import marks, placed
from attnkit.mechanisms.softmax import softmax_attention


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    global_q: Tensor,
    global_k: Tensor,
    global_v: Tensor,
    global_positions: Tensor,
    radius: int,
    keep: Tensor,
    scale: float,
) -> Tensor:
    n = q.shape[2]
    i = torch.arange(n, device=q.device)
    near = (i[:, None] - i).abs() <= radius
    # One set of keys for one softmax: a global token within the window is in it once.
    sees = (near | marks(global_positions, n)[:, None]) & keep[:, None]
    local = softmax_attention(q, k, v, mask=sees, scale=scale, backend="reference")
    sees = keep[:, None].expand(-1, global_q.shape[2], -1)
    rows = softmax_attention(global_q, global_k, global_v, mask=sees, scale=scale, backend="reference")
    return placed(local, rows, global_positions, keep)
