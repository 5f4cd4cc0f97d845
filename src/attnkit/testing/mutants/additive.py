"""Wrong programs of additive attention: what is left out of the scoring network, or put on its wrong side."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnkit.mechanisms.additive import AdditiveAttention
from attnkit.testing.mutants import Mutants

MUTANTS = Mutants()


def _scaled(call: dict[str, Any]) -> dict[str, Any]:
    size = call["q"].shape[-1] ** -0.5
    return {"weight": call["weight"] * size, "gain": None if call["gain"] is None else call["gain"] * size}


def _gain_over_sum(call: dict[str, Any]) -> dict[str, Any]:
    weight = call["weight"]
    if call["gain"] is None:
        return {}
    return {"weight": call["gain"][:, None] * weight / weight.abs().sum(-1, keepdim=True), "gain": None}


def _tanh_apart(call: dict[str, Any]) -> dict[str, Any]:
    # Small enough for tanh to be a straight line, and the weights large enough to make up for it.
    small = 2.0**-10
    return {
        "q": call["q"].tanh() * small,
        "k": call["k"].tanh() * small,
        "weight": call["weight"] / (1 if call["gain"] is not None else small),
        "gain": None if call["gain"] is None else call["gain"] / small,
    }


def _one_network(call: dict[str, Any]) -> dict[str, Any]:
    return {"weight": call["weight"][:1].expand_as(call["weight"])}


def _masked_after(call: dict[str, Any], spec: Any) -> Any:
    if call["mask"] is None or call["return_lse"]:
        return spec.reference(**call)
    n = call["k"].shape[2]
    eye = torch.eye(n, dtype=call["v"].dtype).expand(*call["v"].shape[:2], n, n)
    weights = spec.reference(**{**call, "v": eye, "mask": None})
    kept = weights * call["mask"].dense(call["q"].shape[2], n, call["q"].device)
    return kept @ call["v"].repeat_interleave(call["q"].shape[1] // call["k"].shape[1], 1)


def _unprojected_step(right: Any) -> Any:
    def keys(self: AdditiveAttention, source: Tensor) -> tuple[Tensor, Tensor]:
        k, v = right(self, source)
        return (self._heads(self.q(source)), v) if source.shape[1] == 1 else (k, v)

    return keys


MUTANTS.calling("scaled_scores", "scores divided by the root of the hidden width", _scaled)
MUTANTS.calling("gain_dropped", "the gain accepted and ignored", lambda call: {"gain": None})
MUTANTS.calling("gain_over_sum", "normalised by the sum of sizes", _gain_over_sum)
MUTANTS.calling("tanh_apart", "tanh of query and key apart", _tanh_apart)
MUTANTS.calling("one_network", "the first head's network scores for all", _one_network)
MUTANTS.calling("mask_dropped", "mask lost on one road", lambda call: {"mask": None})
MUTANTS.running("masked_after", "masking after the softmax", lambda spec: lambda **call: _masked_after(call, spec))
MUTANTS.replacing(
    "one_projection", "a step projects its key with the query's map", AdditiveAttention, "_keys", _unprojected_step
)
