"""What the policies for prompts have in common: each makes a mask of the queries and keys of a prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from attnkit.masks import Mask
from attnkit.masks.chosen import ChosenBlocks
from attnkit.state.policies.base import Policy, Seen, wide


@dataclass(frozen=True)
class Prefill(Policy):
    """Chooses what the queries of a prompt see; decoding sees everything. The mask joins the causal one."""

    def mask(self, q: Tensor, k: Tensor, scale: float) -> Mask | None:
        """The mask of the last ``m`` queries ``q`` (b, h, m, d) over ``k`` (b, g, n, d); None where all is seen."""
        raise NotImplementedError

    def state(
        self,
        batch: int,
        heads: int,
        capacity: int,
        key_size: int,
        value_size: int | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        limit: int | None = None,
    ) -> Any:
        from attnkit.state.policies.whole import GuidedState

        return GuidedState(self, batch, heads, capacity, key_size, value_size, dtype=dtype, device=device, limit=limit)


def seen_by(q: Tensor, k: Tensor, scale: float) -> Seen:
    """The keys of a prompt, in order, and its last queries."""
    n = k.shape[2]
    return Seen(q, k, torch.arange(n, device=k.device).expand(*k.shape[:3]), scale, n)


def in_blocks(x: Tensor, block: int, before: int = 0) -> Tensor:
    """``x`` (b, h, n, d) wide, as (b, h, blocks, block, d), with ``before`` rows of zeros in front, and more behind."""
    after = -(before + x.shape[2]) % block
    padded = functional.pad(wide(x), (0, 0, before, after))
    return padded.reshape(*x.shape[:2], -1, block, x.shape[3])


def per_head(k: Tensor, heads: int) -> Tensor:
    """Something of each KV head (axis 1), for each query head of its group."""
    return k.repeat_interleave(heads // k.shape[1], 1)


def of_blocks(chosen: Tensor, block: int, n: int) -> Mask | None:
    """The mask of ``chosen`` bool (b, h, rows, blocks), the last block rows; None where no block is left out."""
    blocks = -(-n // block)
    missing = blocks - chosen.shape[2]
    causal = torch.ones(blocks, blocks, dtype=torch.bool, device=chosen.device).tril()
    if (chosen | ~causal[missing:]).all():
        return None
    # Rows before the first query are asked by nobody.
    return ChosenBlocks(functional.pad(chosen, (0, 0, missing, 0)), block)
