"""Retention in linear time: products within a chunk, one state a query head from chunk to chunk."""

from __future__ import annotations

from torch import Tensor

from attnkit.recurrence import advance, chunked


def forward(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, scale: float, keep: Tensor | None) -> Tensor:
    return chunked(q, *_by_head(q, k, v), log_decay, keep=keep, scale=scale)[0]


def step(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor, scale: float, keep: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Results of ``m`` new tokens and the state after them."""
    return advance(q, *_by_head(q, k, v), log_decay, state, keep=keep, scale=scale)


def _by_head(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values of each query head: its decay is its own, and so is its sum."""
    shared = q.shape[1] // k.shape[1]
    return (k, v) if shared == 1 else (k.repeat_interleave(shared, 1), v.repeat_interleave(shared, 1))
