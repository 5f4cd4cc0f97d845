"""The native kernels of softmax attention: the window and the global keys are one mask, a block list."""

from __future__ import annotations

from torch import Tensor

from attnkit.masks import padding, symmetric_window
from attnkit.mechanisms.longformer.rows import marks, placed
from attnkit.mechanisms.softmax import SPEC as SOFTMAX
from attnkit.mechanisms.softmax import softmax_attention
from attnkit.spec import Call


def rejects(call: Call) -> tuple[str, ...]:
    return SOFTMAX.backend("cpu").rejects(SOFTMAX.call(call["q"], call["k"], call["v"], scale=call["scale"]))


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    global_q: Tensor,
    global_k: Tensor,
    global_v: Tensor,
    global_positions: Tensor,
    radius: int,
    keep: Tensor,
    scale: float,
) -> Tensor:
    real = padding(keep)
    near = symmetric_window(radius) | padding(marks(global_positions, q.shape[2]))
    local = softmax_attention(q, k, v, mask=near & real, scale=scale, backend="cpu")
    rows = softmax_attention(global_q, global_k, global_v, mask=real, scale=scale, backend="cpu")
    return placed(local, rows, global_positions, keep)
