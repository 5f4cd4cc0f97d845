"""Gated linear attention as its recurrence reads: a gate for every channel of the key, then the new token."""

from __future__ import annotations

from torch import Tensor

from attnkit.recurrence import recurrent


def forward(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, scale: float, keep: Tensor | None) -> Tensor:
    return recurrent(q, k, v, log_decay, keep=keep, scale=scale)[0]
