"""Hard attention as the papers write it: all scores, one choice a row, its gradient that of the soft weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnkit.masks import Mask
from attnkit.mechanisms.hard.reinforce import log_prob_and_entropy
from attnkit.noise import gumbel


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask | None,
    scale: float,
    kind: str,
    temperature: float,
    seed: int | None,
    return_log_prob: bool,
) -> Any:
    (b, h, m, d), (g, n, e) = q.shape, v.shape[1:]
    work = torch.promote_types(q.dtype, torch.float32)
    if n == 0:
        nothing = q.new_zeros(b, h, m, dtype=work)
        o = q.new_zeros(b, h, m, e)
        return (o, nothing, nothing.clone()) if return_log_prob else o
    grouped = q.reshape(b, g, h // g, m, d).to(work)
    scores = torch.einsum("bgrmd,bgnd->bgrmn", grouped, k.to(work)).reshape(b, h, m, n) * scale
    if mask is not None:
        scores = scores.masked_fill(~mask.dense(m, n, q.device), -torch.inf)
    noisy = scores
    if seed is not None:
        positions = torch.arange(n - m, n, device=q.device), torch.arange(n, device=q.device)
        noisy = scores + gumbel(seed, b, h, *positions).to(work)
    top = noisy.amax(-1, keepdim=True)
    choice = noisy.argmax(-1)  # the first of equals
    values = v.to(work).repeat_interleave(h // g, 1)
    o = values.gather(2, choice[..., None].expand(-1, -1, -1, e))
    if kind != "sample":
        soft = torch.softmax(noisy.masked_fill(top == -torch.inf, 0.0) / temperature, -1)
        # Nothing, but with the gradient of the soft weights. A value is left out where 0 times it would be NaN.
        o = o + (soft - soft.detach()) @ torch.where(values.isfinite(), values, 0.0).detach()
    o = o.masked_fill(top == -torch.inf, 0.0).masked_fill(top.isnan(), torch.nan).to(q.dtype)
    return (o, *log_prob_and_entropy(scores, choice)) if return_log_prob else o
