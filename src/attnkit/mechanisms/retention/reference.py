"""Retention as its recurrence reads: every token fades what is there, and adds the product of its key and value."""

from __future__ import annotations

from torch import Tensor

from attnkit.recurrence import recurrent


def forward(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, scale: float, keep: Tensor | None) -> Tensor:
    shared = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(shared, 1) for x in (k, v))  # a head's decay is its own, and so is its sum
    return recurrent(q, k, v, log_decay, keep=keep, scale=scale)[0]
