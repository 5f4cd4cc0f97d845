"""Wrong programs of retention: when a sum fades, by how much, and what a state forgets to carry."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from attnkit.mechanisms.retention import chunk, layer
from attnkit.testing.mutants import Mutants

MUTANTS = Mutants()


def _faded_once_more(call: dict[str, Any], o: Tensor) -> Tensor:
    faded: Tensor = o * call["log_decay"].to(o.dtype).exp()[:, None, None]
    return faded


def _one_decay_a_group(call: dict[str, Any]) -> dict[str, Any]:
    shared = call["q"].shape[1] // call["k"].shape[1]
    return {"log_decay": call["log_decay"][::shared].repeat_interleave(shared)}


def _divided(call: dict[str, Any], o: Tensor) -> Tensor:
    """By the sum of the decays, as RetNet's parallel form does before a norm takes it out again."""
    m, n = call["q"].shape[2], call["k"].shape[2]
    rows = torch.arange(n - m + 1, n + 1, dtype=o.dtype)
    decay = call["log_decay"].to(o.dtype).exp()[:, None].clamp(max=1 - 1e-6)
    divided: Tensor = o / ((1 - decay**rows) / (1 - decay)).sqrt()[..., None]
    return divided


def _no_decay_between_steps(right: Any) -> Any:
    def advance(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor, **settings: Any) -> Any:
        lost = q.shape[2] * log_decay[None, :, None, None]
        return right(q, k, v, log_decay, state / lost.exp(), **settings)

    return advance


def _from_zero(right: Any) -> Any:
    def project(self: Any, x: Tensor, positions: Tensor) -> Any:
        return right(self, x, positions - positions[..., :1])

    return project


MUTANTS.returning("fades_before_reading", "a token's own value fades as well", _faded_once_more)
MUTANTS.calling("decays_base_2", "logarithms in base 2", lambda call: {"log_decay": call["log_decay"] / math.log(2)})
MUTANTS.calling("decays_scaled", "the scale multiplies decays", lambda c: {"log_decay": c["log_decay"] * c["scale"]})
MUTANTS.calling("one_decay_a_group", "the first head's decay serves its whole group", _one_decay_a_group)
MUTANTS.returning("divided_by_decays", "sums are divided by the root of their decays", _divided)
MUTANTS.replacing(
    "state_stays", "a step reads its state as if no time had passed", chunk, "advance", _no_decay_between_steps
)
MUTANTS.replacing(
    "positions_restart", "each step turns from 0", layer.RetentionAttention, "_project", _from_zero, preset="retnet"
)
