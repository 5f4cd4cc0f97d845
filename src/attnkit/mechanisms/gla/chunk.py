"""Gated linear attention in linear time: products within a chunk, in tiles, and one state from chunk to chunk."""

from __future__ import annotations

from torch import Tensor

from attnkit.recurrence import advance, chunked


def forward(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, scale: float, keep: Tensor | None) -> Tensor:
    return chunked(q, k, v, log_decay, keep=keep, scale=scale)[0]


def step(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor, scale: float, keep: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Results of ``m`` new tokens and the state after them."""
    return advance(q, k, v, log_decay, state, keep=keep, scale=scale)
