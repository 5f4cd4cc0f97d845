"""Linear attention by the native kernels, forward and backward; of the feature maps elu and relu are theirs too."""

from __future__ import annotations

from torch import Tensor

from attnkit.mechanisms.linear.maps import FeatureMap, count, features
from attnkit.native.recurrence import MAPS, reasons, recurrence
from attnkit.spec import Call


def rejects(call: Call) -> tuple[str, ...]:
    q, v, projection = call["q"], call["v"], call["projection"]
    mapped = count(call["feature_map"], q.shape[3], 0 if projection is None else projection.shape[0])
    found = reasons(q, mapped, v.shape[3] and v.shape[3] + 1)
    if not call["causal"]:
        found += ("causal is False, which is two products and has no native kernel",)
    return found


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    feature_map: FeatureMap,
    projection: Tensor | None,
    causal: bool,
    keep: Tensor | None,
) -> Tensor:
    if feature_map in MAPS:
        return recurrence(q, k, v, keep=keep, feature_map=feature_map, means=True)[0]
    mapped = features(q, k, feature_map, projection, keep=keep)
    return recurrence(mapped.q, mapped.k, v.to(mapped.q.dtype), mapped.log_decay, means=True)[0].to(q.dtype)
