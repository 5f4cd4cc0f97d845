"""Retention by the native kernels, forward and backward: products within a chunk, one state from chunk to chunk."""

from __future__ import annotations

import torch
from torch import Tensor

from attnkit.native.recurrence import reasons, recurrence
from attnkit.spec import Call


def rejects(call: Call) -> tuple[str, ...]:
    found = reasons(call["q"], call["k"].shape[3], call["v"].shape[3])
    if torch.is_grad_enabled() and call["log_decay"].requires_grad:
        # A sum over all tokens of what nearly cancels: 1.6 times the allowed error at level v3.
        found += (
            f"a gradient is wanted for {call['log_decay'].shape[0]} log_decay, the native kernel's is not exact enough",
        )
    return found


def forward(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, scale: float, keep: Tensor | None) -> Tensor:
    return recurrence(q, k, v, log_decay, keep=keep, scale=scale)[0]
