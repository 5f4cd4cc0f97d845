"""The delta rule by the native kernels, forward and backward, which find unlawful tokens themselves."""

from __future__ import annotations

from torch import Tensor

from attnkit.native.recurrence import reasons, recurrence
from attnkit.spec import Call


def rejects(call: Call) -> tuple[str, ...]:
    return reasons(call["q"], call["k"].shape[3], call["v"].shape[3])


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    state: Tensor | None,
    read_scale: float,
    return_state: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    o, last = recurrence(q, k, v, log_decay, state, beta=beta, scale=read_scale)
    return (o, last) if return_state else o
