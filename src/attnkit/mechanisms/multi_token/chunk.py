"""Blocks of queries over the keys up to their end, each with the rows before it that the kernel reaches.

Memory is one block's logits, in the backward as well, where each block is computed again.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import conv2d, pad

from attnkit.blocks import joined, spans
from attnkit.mechanisms.multi_token.mixing import mixed, weighted

BLOCK = 64


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kernel: Tensor | None,
    mix_logits: Tensor | None,
    mix_weights: Tensor | None,
    scale: float,
) -> Tensor:
    before = 0 if kernel is None else kernel.shape[1] - 1
    return attend(pad(q, (0, 0, before, 0)), k, v, kernel, mix_logits, mix_weights, scale)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kernel: Tensor | None,
    mix_logits: Tensor | None,
    mix_weights: Tensor | None,
    scale: float,
) -> Tensor:
    """Rows of all but the first ``s - 1`` queries, which only the kernel of ``s`` rows reads."""
    before = 0 if kernel is None else kernel.shape[1] - 1
    m = q.shape[2] - before
    past, weights = k.shape[2] - m, (kernel, mix_logits, mix_weights, scale)
    o: Tensor = joined(
        _block,
        (
            (q[:, :, start : end + before], k[:, :, : past + end], v[:, :, : past + end], *weights)
            for start, end in spans(m, BLOCK)
        ),
    )
    return o


def _block(
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
    grouped = q.to(work).reshape(b, g, -1, d)
    logits = (grouped @ k.to(work).mT).view(b, h, m, n) * scale
    # Zero and not -inf: the convolution adds it up, and softmax attention hides the future afterwards.
    logits = logits.tril(n - m)
    if kernel is not None:
        logits = conv2d(logits, kernel.to(work)[:, None], padding=(0, kernel.shape[2] // 2), groups=h)
        logits = logits.tril(n - logits.shape[2])
    return weighted(mixed(logits, mix_logits), v.to(work), mix_weights, None).to(q.dtype)
