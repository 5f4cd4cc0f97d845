"""Wrong programs of Luong attention: the Gaussian and the window put where blog posts put them, lengths forgotten."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnkit.testing.mutants import Mutants

MUTANTS = Mutants()


def _padded_length(call: dict[str, Any]) -> dict[str, Any]:
    lengths = call["lengths"]
    return {"lengths": lengths if lengths is None else torch.full_like(lengths, call["k"].shape[2])}


def _renormalised(call: dict[str, Any], found: Tensor, spec: Any) -> Tensor:
    if call["local"] != "p":
        return found
    total: Tensor = spec.reference(**{**call, "v": torch.ones_like(call["v"][..., :1])})
    return torch.where(total > 0, found / total.clamp_min(1e-30), 0.0)


def _scaled(call: dict[str, Any]) -> dict[str, Any]:
    if call["score"] == "concat":
        return {"vector": call["vector"] * call["q"].shape[-1] ** -0.5}
    if call["local"] == "p":
        return {}
    return {"q": call["q"] * call["q"].shape[-1] ** -0.5}


def _counted_from_one(call: dict[str, Any]) -> dict[str, Any]:
    return {"start": call["start"] + 1} if call["local"] == "m" else {}


def _narrow(call: dict[str, Any]) -> dict[str, Any]:
    return {"radius": max(1, call["radius"] - 1)}


def _renormalising(spec: Any) -> Any:
    return lambda **call: _renormalised(call, spec.reference(**call), spec)


MUTANTS.calling("padded_length", "the padded length for the true one", _padded_length)
MUTANTS.running("renormalised", "weights normalised again after the Gaussian", _renormalising)
MUTANTS.calling("scaled_scores", "scores divided by the root of the size", _scaled)
MUTANTS.calling("counted_from_one", "monotonic places counted from 1", _counted_from_one)
MUTANTS.calling("narrow_window", "windows one position too narrow on each side", _narrow)
MUTANTS.calling("start_forgotten", "a stepping decoder always at place 0", lambda call: {"start": 0})
