"""The form in linear time: one state carried from chunk to chunk, or where there is no order two products."""

from __future__ import annotations

from torch import Tensor

from attnkit.mechanisms.linear.maps import FeatureMap, features
from attnkit.mechanisms.linear.sums import divided, with_ones
from attnkit.recurrence import advance, chunked


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
        return divided(chunked(mapped.q, mapped.k, values, mapped.log_decay)[0]).to(q.dtype)
    state = mapped.k.mT @ values
    sums = mapped.q.unflatten(1, (k.shape[1], -1)) @ state[:, :, None]
    return divided(sums.flatten(1, 2)).to(q.dtype)


def step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor,
    largest: Tensor | None,
    feature_map: FeatureMap,
    projection: Tensor | None,
    keep: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Results of ``m`` new tokens, the state after them (b, g, f, e + 1), and its unit for ``favor``."""
    if largest is not None:  # a state in which no key has weight has no unit yet
        largest = largest.masked_fill(state[..., -1].detach().amax(-1) == 0, -float("inf"))
    mapped = features(q, k, feature_map, projection, largest=largest, keep=keep)
    sums, after = advance(mapped.q, mapped.k, with_ones(v), mapped.log_decay, state, keep=keep)
    return divided(sums).to(q.dtype), after, mapped.largest
