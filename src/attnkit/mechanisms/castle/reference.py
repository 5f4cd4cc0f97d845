"""CASTLE for a whole sequence, as the paper's parallel form: no lookahead key is formed, only its products."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import silu

from attnkit.masks import causal
from attnkit.mechanisms.softmax import softmax_attention


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lookahead_q: Tensor,
    lookahead_k: Tensor,
    lookahead_v: Tensor,
    window: int,
    scale: float,
    lookahead_scale: float,
) -> Tensor:
    m, n = q.shape[2], k.shape[2]
    work = torch.promote_types(q.dtype, torch.float32)
    # How much token s (row) takes up of each token j (column) after it: s < j <= s + window.
    taken = torch.sigmoid(lookahead_q.to(work) @ lookahead_k.to(work).mT * lookahead_scale).triu(1).tril(window)
    # A query meets what came up to its own token: j <= i.
    met = (q.to(work) @ lookahead_v.to(work).mT * lookahead_scale).tril(n - m)
    # What is NaN spoils the queries that meet it, and not those for which it counts 0 times.
    spoiled = taken.isnan().cumsum(-1)[..., n - m :].mT > 0
    s = torch.where(spoiled, torch.nan, met @ taken.nan_to_num(0).mT)
    o: Tensor = softmax_attention(q, k, v, mask=causal(), scale=scale, bias=-silu(s), backend="reference")
    return o
