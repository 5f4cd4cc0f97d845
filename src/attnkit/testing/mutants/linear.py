"""Wrong programs of linear attention: what is summed, what it is divided by, and in which unit."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from attnkit.mechanisms.linear import chunk
from attnkit.spec import Mechanism
from attnkit.testing.mutants import Mutants

MUTANTS = Mutants()


def _not_divided(spec: Mechanism) -> Any:
    def forward(**call: Any) -> Tensor:
        ones = torch.ones_like(call["v"])
        # The whole sum is the mean times the number of visible keys.
        n, m = ones.shape[2], call["q"].shape[2]
        o: Tensor = spec.reference(**call) * torch.arange(n - m + 1, n + 1, dtype=ones.dtype)[:, None]
        return o

    return forward


def _lost(right: Any) -> Any:
    def advance(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor, **settings: Any) -> Any:
        return right(q, k, v, log_decay, state if q.shape[2] == 1 else None, **settings)

    return advance


def _unit_of_each(right: Any) -> Any:
    """Each key is divided by its own largest feature, and sums are kept in the units that they have."""

    def features(*given: Any, **settings: Any) -> Any:
        found = right(*given, **settings)
        if found.largest is None:
            return found
        own = found.k / found.k.amax(-1, keepdim=True).clamp(min=torch.finfo(found.k.dtype).tiny)
        return dataclasses.replace(found, k=own, log_decay=None)

    return features


def _unit_forgotten(right: Any) -> Any:
    def features(*given: Any, **settings: Any) -> Any:
        return right(*given, **{**settings, "largest": None})

    return features


def _next_seen(call: dict[str, Any], o: Tensor) -> Tensor:
    return torch.cat([o[:, :, 1:], o[:, :, -1:]], 2)


MUTANTS.returning("next_key_seen", "a query sees one key too many", _next_seen)
MUTANTS.running("sums_not_divided", "sums are not divided by the weights", _not_divided)
MUTANTS.calling("bidirectional", "no causal order", lambda call: {"causal": False})
MUTANTS.calling("keys_scaled", "keys are scaled as for softmax", lambda call: {"k": call["k"] * 0.5})
MUTANTS.replacing("step_loses_state", "a step of several tokens starts from nothing", chunk, "advance", _lost)
MUTANTS.replacing(
    "unit_of_each_key",
    "each key is divided by its largest feature",
    chunk,
    "features",
    _unit_of_each,
    preset="performer",
)
MUTANTS.replacing(
    "unit_forgotten", "a step does not know its state's unit", chunk, "features", _unit_forgotten, preset="performer"
)
