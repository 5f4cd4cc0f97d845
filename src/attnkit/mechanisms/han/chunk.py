"""Sentences as segments of the packed words: sums by index, so that nothing has ``sentences x words`` numbers."""

from __future__ import annotations

import torch
from torch import Tensor


def forward(x: Tensor, weight: Tensor, offset: Tensor, vector: Tensor, ids: Tensor, sentences: int) -> Tensor:
    work = torch.promote_types(x.dtype, torch.float32)
    b, n, width = x.shape
    inside = (ids >= 0) & (ids < sentences)
    words = x.to(work).masked_fill(~inside[..., None], 0)
    scores = torch.tanh(words @ weight.to(work).T + offset.to(work)) @ vector.to(work)
    # One more slot a document takes the words of no sentence.
    slots = torch.where(inside, ids, sentences).long() + (sentences + 1) * torch.arange(b, device=x.device)[:, None]
    slot, count = slots.flatten(), b * (sentences + 1)
    top = scores.new_zeros(count).scatter_reduce(0, slot, scores.detach().flatten(), "amax", include_self=False)
    powers = torch.exp(scores.flatten() - top[slot])
    total = powers.new_zeros(count).index_add(0, slot, powers)
    shares = (powers / total[slot])[:, None] * words.reshape(b * n, width)
    o = shares.new_zeros(count, width).index_add(0, slot, shares)
    return o.view(b, sentences + 1, width)[:, :sentences].to(x.dtype)
