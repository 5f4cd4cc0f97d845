"""Which tokens are steps of a delta rule: all others would let the state grow without bound."""

from __future__ import annotations

import torch
from torch import Tensor

# Up to this beta |k|^2 a step is a reflection, or less than one; the margin is for keys normalised in bfloat16.
LARGEST = 2.1


@torch.no_grad()
def spoiled_from(k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None) -> Tensor:
    """Bool ``(b, h, n)``: this token, or one before it, has ``beta |k|^2`` outside 0 to 2.1, grows or is not finite.

    Products of such steps overflow, and in a form with matrices of many tokens ``0 x inf`` would carry that to the
    tokens before. Results are NaN from the first one on, and what came before it knows nothing of it.
    """
    work = torch.promote_types(k.dtype, torch.float32)
    square = torch.linalg.vector_norm(k, dim=-1, dtype=work).square()
    strength = beta.to(work) * square.repeat_interleave(beta.shape[1] // k.shape[1], 1)
    # Reductions over channels, which unlike comparisons make no tensor of the size of the input.
    good = (strength >= 0) & (strength <= LARGEST) & torch.linalg.vector_norm(v, torch.inf, -1).isfinite()
    if log_decay is not None:
        good = good & ((log_decay.amax(-1) if log_decay.dim() == 4 else log_decay) <= 0)
    spoiled: Tensor = (~good).cumsum(-1) > 0
    return spoiled
