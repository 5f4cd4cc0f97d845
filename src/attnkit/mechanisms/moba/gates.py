"""Which blocks a query attends to beside its own: those whose mean key it agrees with most."""

from __future__ import annotations

import torch
from torch import Tensor

from attnkit.blocks import spans

GATES = 1 << 22
"""The most gates that are ranked at once: 16 MB of float32."""


def block_means(k: Tensor, block: int) -> Tensor:
    """Mean key ``(b, g, c, d)`` of each of the ``c`` complete blocks, in float32 at least and without gradient."""
    whole = k.shape[2] // block
    kept = k.detach()[:, :, : whole * block].to(torch.promote_types(k.dtype, torch.float32))
    means: Tensor = kept.unflatten(2, (whole, block)).mean(3)
    return means


@torch.no_grad()
def best_blocks(q: Tensor, means: Tensor, first: int, block: int, top: int) -> Tensor:
    """The up to ``top - 1`` past blocks with the highest gates, int64 ``(b, h, m, s)``, -1 where there is none.

    ``q`` stands at positions ``first`` and on. Of equal gates the earlier block wins.
    """
    (b, h, m, d), (g, c) = q.shape, means.shape[1:3]
    found = []
    for start, end in spans(m, max(1, GATES // max(1, b * h * c))):
        grouped = q[:, :, start:end].to(means.dtype).reshape(b, g, h // g, end - start, d)
        gates = torch.einsum("bgrmd,bgcd->bgrmc", grouped, means).reshape(b, h, end - start, c)
        own = torch.arange(first + start, first + end, device=q.device)[:, None] // block
        gates.masked_fill_(torch.arange(c, device=q.device) >= own, -torch.inf)
        ranked = gates.sort(dim=-1, descending=True, stable=True)
        best, gate = ranked.indices[..., : top - 1], ranked.values[..., : top - 1]
        found.append(best.masked_fill(gate == -torch.inf, -1))
    return torch.cat(found, 2)
