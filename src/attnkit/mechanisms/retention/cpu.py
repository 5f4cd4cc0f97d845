"""Retention by the native kernels, forward and backward: products within a chunk, one state from chunk to chunk."""

from __future__ import annotations

from torch import Tensor

from attnkit.native.recurrence import reasons, recurrence
from attnkit.spec import Call


def rejects(call: Call) -> tuple[str, ...]:
    return reasons(call["q"], call["k"].shape[3], call["v"].shape[3])


def forward(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, scale: float, keep: Tensor | None) -> Tensor:
    return recurrence(q, k, v, log_decay, keep=keep, scale=scale)[0]
