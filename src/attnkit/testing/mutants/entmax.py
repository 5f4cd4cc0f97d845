"""Wrong programs of entmax attention: thresholds of other sets, hidden keys that count, the wrong power."""

from __future__ import annotations

from typing import Any

import torch

from attnkit.mechanisms.softmax import softmax_attention
from attnkit.testing.mutants import Mutants

MUTANTS = Mutants()


def _softmax(spec: Any) -> Any:
    return lambda alpha, **call: softmax_attention(**call, backend="reference")


def _thresholded_softmax(spec: Any) -> Any:
    """Small weights of softmax are cut, and the rest is not what entmax gives."""

    def wrong(q: Any, k: Any, v: Any, alpha: float, mask: Any, scale: float) -> Any:
        n, shared = k.shape[2], q.shape[1] // k.shape[1]
        scores = (q.float() @ k.float().repeat_interleave(shared, 1).mT * scale).to(q.dtype)
        if mask is not None:
            scores = scores.masked_fill(~mask.dense(q.shape[2], n, q.device), -torch.inf)
        p = scores.softmax(-1).nan_to_num()
        p = p * (p > 0.01)
        return (p / p.sum(-1, keepdim=True).clamp(min=1e-9)) @ v.repeat_interleave(shared, 1)

    return wrong


MUTANTS.running("softmax", "softmax under another name", _softmax)
MUTANTS.running("cut_softmax", "weights of softmax below a hundredth are dropped", _thresholded_softmax)
MUTANTS.calling("other_alpha", "sparsemax for 1.5-entmax and the reverse", lambda call: {"alpha": 3.5 - call["alpha"]})
MUTANTS.calling("unmasked", "hidden keys compete", lambda call: {"mask": None})
MUTANTS.calling("halved", "scores are halved for both", lambda call: {"scale": call["scale"] / 2})
MUTANTS.returning(
    "not_normalised", "rows add up to a little more than 1", lambda call, o: (o.double() * 1.001).to(o.dtype)
)
