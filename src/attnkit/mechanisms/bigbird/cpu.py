"""The native kernels of softmax attention, which skip the blocks that nobody sees."""

from __future__ import annotations

from torch import Tensor

from attnkit.masks import bigbird_layout, block_sparse, padding
from attnkit.mechanisms.softmax import SPEC as SOFTMAX
from attnkit.mechanisms.softmax import softmax_attention
from attnkit.spec import Call


def rejects(call: Call) -> tuple[str, ...]:
    return SOFTMAX.backend("cpu").rejects(SOFTMAX.call(call["q"], call["k"], call["v"], scale=call["scale"]))


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    random_blocks: Tensor,
    block: int,
    window: int,
    keep: Tensor,
    scale: float,
) -> Tensor:
    mask = block_sparse(bigbird_layout(random_blocks, window), block) & padding(keep)
    o: Tensor = softmax_attention(q, k, v, mask=mask, scale=scale, backend="cpu")
    return o.masked_fill(~keep[:, None, :, None], 0.0)
