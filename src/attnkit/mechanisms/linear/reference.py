"""Linear attention as its definition reads: sums over one token after the other, or all pairs."""

from __future__ import annotations

import torch
from torch import Tensor

from attnkit.mechanisms.linear.maps import FeatureMap, features
from attnkit.mechanisms.linear.sums import divided, with_ones
from attnkit.recurrence import recurrent


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    feature_map: FeatureMap,
    projection: Tensor | None,
    causal: bool,
    keep: Tensor | None,
) -> Tensor:
    mapped = features(q, k, feature_map, projection, keep=keep, running=causal)
    values = with_ones(v)
    if causal:
        return divided(recurrent(mapped.q, mapped.k, values, mapped.log_decay)[0]).to(q.dtype)
    queries = mapped.q.unflatten(1, (k.shape[1], -1))
    weights = torch.einsum("bgrmf,bgnf->bgrmn", queries, mapped.k)
    return divided(torch.einsum("bgrmn,bgne->bgrme", weights, values).flatten(1, 2)).to(q.dtype)
