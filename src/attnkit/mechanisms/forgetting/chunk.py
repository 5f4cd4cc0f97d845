"""Blocks of queries, each over the keys up to its end, with one bias a key in place of one a pair.

Softmax does not see a term that all keys of a row share, so ``c_i`` may be replaced by any number of the block: with
the block's first ``c``, the bias depends on the key alone, and the near keys, which count, keep small biases that
round finely. Memory is one block's logits, in the backward as well, where each block is computed again.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnkit.blocks import joined, spans
from attnkit.masks import causal
from attnkit.mechanisms.softmax import softmax_attention

BLOCK = 128


def forward(q: Tensor, k: Tensor, v: Tensor, log_f: Tensor, scale: float) -> Tensor:
    total = log_f.to(torch.promote_types(q.dtype, torch.float32)).cumsum(-1)
    return attend(q, k, v, total, scale)


def attend(q: Tensor, k: Tensor, v: Tensor, total: Tensor, scale: float) -> Tensor:
    """Attention ``(b, h, m, e)`` for gates already summed: ``total`` ``(b, h, n)``."""
    past = k.shape[2] - q.shape[2]
    o: Tensor = joined(
        _block,
        (
            (q[:, :, start:end], *(x[:, :, : past + end] for x in (k, v, total)), past + start, scale)
            for start, end in spans(q.shape[2], BLOCK)
        ),
    )
    return o


def _block(q: Tensor, k: Tensor, v: Tensor, total: Tensor, first: int, scale: float) -> Tensor:
    """Queries from position ``first`` to the last of the keys."""
    bias = total[:, :, None, first : first + 1] - total[:, :, None] if q.shape[2] else None
    o: Tensor = softmax_attention(q, k, v, mask=causal(), scale=scale, bias=bias)
    return o
