"""Blocks are chosen for all queries first; then each query meets its own block and the chosen ones, and no others."""

from __future__ import annotations

from torch import Tensor

from attnkit.masks import causal
from attnkit.mechanisms.moba.gates import best_blocks, block_means
from attnkit.mechanisms.moba.selected import attend
from attnkit.mechanisms.softmax import softmax_attention


def forward(q: Tensor, k: Tensor, v: Tensor, block: int, top: int, scale: float) -> Tensor:
    return over(q, k, v, None, block, top, scale)


def over(q: Tensor, k: Tensor, v: Tensor, means: Tensor | None, block: int, top: int, scale: float) -> Tensor:
    """The same with the ``means`` of complete blocks at hand, as a state has them."""
    m, n = q.shape[2], k.shape[2]
    if block * top >= n:
        o: Tensor = softmax_attention(q, k, v, mask=causal(), scale=scale)
        return o
    means = block_means(k, block) if means is None else means
    return attend(q, k, v, best_blocks(q, means, n - m, block, top), block, scale)
