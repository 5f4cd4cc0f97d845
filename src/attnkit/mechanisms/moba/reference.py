"""MoBA as the paper writes it: rank all blocks of each query, and hide what lies outside the best of them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from attnkit.mechanisms.softmax import softmax_attention


def forward(q: Tensor, k: Tensor, v: Tensor, block: int, top: int, scale: float) -> Tensor:
    seen = visible(q.detach(), k.detach(), block, top)
    o: Tensor = softmax_attention(q, k, v, mask=seen, scale=scale, backend="reference")
    return o


def visible(q: Tensor, k: Tensor, block: int, top: int) -> Tensor:
    """Which keys each query sees, bool ``(b, h, m, n)``."""
    (b, h, m, d), (g, n) = q.shape, k.shape[1:3]
    work, whole = torch.promote_types(q.dtype, torch.float32), n // block
    means = k[:, :, : whole * block].to(work).unflatten(2, (whole, block)).mean(3)
    gates = torch.einsum("bgrmd,bgcd->bgrmc", q.to(work).reshape(b, g, h // g, m, d), means).reshape(b, h, m, whole)
    positions, keys = torch.arange(n - m, n, device=q.device)[:, None], torch.arange(n, device=q.device)
    past = torch.arange(whole, device=q.device) < positions // block
    # A stable sort leaves equal gates in the order of their blocks.
    rank = gates.masked_fill(~past, -torch.inf).argsort(dim=-1, descending=True, stable=True).argsort(-1)
    chosen = pad(((rank < top - 1) & past).repeat_interleave(block, -1), (0, n - whole * block))
    return chosen | ((keys // block == positions // block) & (keys <= positions))
