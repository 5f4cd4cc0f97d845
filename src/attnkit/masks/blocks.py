"""BigBird's blocks: which random ones a block of queries sees, and the layout of all that it sees."""

from __future__ import annotations

import torch
from torch import Tensor


def random_blocks(blocks: int, *, window: int = 3, random: int = 3, heads: int = 1, seed: int = 0) -> Tensor:
    """Random key blocks of each query block: int64 ``(heads, blocks, random)``, -1 where there is no other block.

    Each row draws without replacement from the blocks that are neither in its window nor the first or the last. Those
    two see everything, so their rows are -1. The same arguments give the same blocks, everywhere and at any time.
    """
    if window < 1 or window % 2 == 0:
        raise ValueError(f"bigbird: window is {window}, expected an odd number of blocks: as many on either side")
    if random < 0:
        raise ValueError(f"bigbird: random is {random}, expected at least 0")
    row, last = torch.arange(blocks)[:, None], blocks - 1
    low, high = (row - window // 2).clamp(min=1), (row + window // 2).clamp(max=last - 1)
    near = (high - low + 1).clamp(min=0)
    choices = (last - 1 - near).clamp(min=0)
    chance = torch.rand(heads, blocks, random, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    drawn = torch.empty(heads, blocks, 0, dtype=torch.int64)
    for i in range(random):
        # One of the choices that are left, counted past those already taken.
        index = (chance[..., i] * (choices[:, 0] - i)).long()
        for taken in drawn.sort(-1).values.unbind(-1):
            index += index >= taken
        drawn = torch.cat([drawn, index[..., None]], -1)
    found = torch.where(drawn + 1 < low, drawn + 1, drawn + 1 + near)
    nowhere = (torch.arange(random) >= choices) | (row == 0) | (row == last)
    return torch.where(nowhere, -1, found)


def bigbird_layout(random: Tensor, window: int) -> Tensor:
    """Bool ``(heads, blocks, blocks)``: first and last block, ``window`` blocks around, and those named."""
    heads, blocks, _ = random.shape
    i = torch.arange(blocks, device=random.device)
    edge = (i == 0) | (i == blocks - 1)
    # One column more than there are blocks takes what is nowhere.
    named = random.new_zeros(heads, blocks, blocks + 1, dtype=torch.bool)
    named = named.scatter(2, torch.where(random < 0, blocks, random), True)[..., :-1]
    return named | ((i[:, None] - i).abs() <= window // 2) | edge | edge[:, None]
