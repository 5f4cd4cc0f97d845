"""The pyramid as it is drawn: attend, keep every second token for the next level, hold each result until the next."""

from __future__ import annotations

import torch
from torch import Tensor

from attnkit.masks import causal
from attnkit.mechanisms.hierarchical.levels import coarser, maps, turned
from attnkit.mechanisms.softmax import softmax_attention
from attnkit.positions import Rotary


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    down: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    v_weight: Tensor | None,
    q_gain: Tensor | None,
    k_gain: Tensor | None,
    rotary: Rotary | None,
) -> Tensor:
    out, work = q.dtype, torch.promote_types(q.dtype, torch.float32)
    q, k, v = q.to(work), k.to(work), v.to(work)
    i, found = torch.arange(q.shape[2], device=q.device), []
    for level, weights in enumerate([*maps(down, q_weight, k_weight, v_weight), None]):
        q, k = turned(q, k, (q_gain, k_gain), rotary, level)
        o: Tensor = softmax_attention(q, k, v, mask=causal(), backend="reference")
        found.append(o[:, :, i // 2**level])
        if weights is not None:
            q, k, v = coarser(o[:, :, ::2], *weights)
    return torch.cat(found, -1).to(out)
