"""What lies between two levels of the pyramid: where tokens stand, and how results become the next level's tokens."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import rms_norm

from attnkit.positions import Rotary


def maps(*weights: Tensor | None) -> list[tuple[Tensor, ...]]:
    """The weights between each two levels, from those of all: none where there is one level."""
    return list(zip(*(x.unbind() for x in weights if x is not None), strict=True))


def coarser(o: Tensor, down: Tensor, q_weight: Tensor, k_weight: Tensor, v_weight: Tensor) -> tuple[Tensor, ...]:
    """Queries, keys and values of the level above, from the results ``(b, h, n, e)`` of the tokens that it keeps."""
    x = torch.einsum("bhne,hex->bnx", o, down.to(o.dtype))
    return tuple(torch.einsum("bnx,hxd->bhnd", x, weight.to(o.dtype)) for weight in (q_weight, k_weight, v_weight))


Gains = tuple[Tensor | None, Tensor | None]
"""Those of queries and of keys, ``(1 + p, d)`` each."""


def turned(
    q: Tensor, k: Tensor, gains: Gains, rotary: Rotary | None, level: int, first: int = 0
) -> tuple[Tensor, Tensor]:
    """Both normalised where there are gains, and rotated by the positions ``j 2^level``, ``j`` from ``first`` on."""
    q, k = (
        x if gain is None else rms_norm(x, x.shape[-1:], gain[level].to(x.dtype))
        for x, gain in zip((q, k), gains, strict=True)
    )
    if rotary is None:
        return q, k
    positions = torch.arange(first, first + q.shape[2], device=q.device) << level
    return rotary.rotate(q, positions), rotary.rotate(k, positions)
