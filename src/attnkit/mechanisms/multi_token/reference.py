"""Multi-token attention as the paper writes it: all logits, the kernel's taps one after the other."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from attnkit.masks import causal
from attnkit.mechanisms.multi_token.mixing import mixed, weighted


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kernel: Tensor | None,
    mix_logits: Tensor | None,
    mix_weights: Tensor | None,
    scale: float,
) -> Tensor:
    (b, h, m, d), (g, n) = q.shape, k.shape[1:3]
    work = torch.promote_types(q.dtype, torch.float32)
    grouped = q.to(work).reshape(b, g, h // g, m, d)
    logits = torch.einsum("bgrmd,bgnd->bgrmn", grouped, k.to(work)).reshape(b, h, m, n) * scale
    if kernel is not None:
        # The future is 0 before the convolution: keys right of this one enter as earlier queries saw them.
        past = logits.masked_fill(~causal().dense(m, n, q.device), 0.0)
        rows, columns = kernel.shape[1:]
        around = pad(past, (columns // 2, columns // 2, rows - 1, 0))
        logits = torch.zeros_like(past)
        for row in range(rows):
            for column in range(columns):
                tap = kernel[:, row, column].to(work)[:, None, None]
                logits = logits + tap * around[:, :, row : row + m, column : column + n]
    visible = logits.masked_fill(~causal().dense(m, n, q.device), 0.0)  # what mixing must not multiply: later garbage
    return weighted(mixed(visible, mix_logits), v.to(work), mix_weights, "reference").to(q.dtype)
