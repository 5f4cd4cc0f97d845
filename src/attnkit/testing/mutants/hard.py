"""Wrong programs of hard attention: which key wins, what an empty row takes, and where a gradient goes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import attnkit
from attnkit.mechanisms.hard import HardAttention
from attnkit.testing.mutants import Mutants

MUTANTS = Mutants()


def _keep(call: dict[str, Any]) -> Tensor:
    mask = call["mask"] or attnkit.full()
    keep: Tensor = mask.dense(call["q"].shape[2], call["k"].shape[2], call["q"].device)
    return keep


def _last_of_equals(call: dict[str, Any]) -> dict[str, Any]:
    return {"k": call["k"].flip(2), "v": call["v"].flip(2), "mask": attnkit.explicit(_keep(call).flip(-1))}


def _first_key_of_empty_rows(call: dict[str, Any]) -> dict[str, Any]:
    keep = _keep(call).clone()
    keep[..., :1] |= ~keep.any(-1, keepdim=True)
    return {"mask": attnkit.explicit(keep)}


def _masked_after(call: dict[str, Any], spec: Any) -> Any:
    (b, g, n, _), h = call["v"].shape, call["q"].shape[1]
    eye = torch.eye(n, dtype=call["v"].dtype).expand(b, g, n, n)
    chosen = spec.reference(**{**call, "v": eye, "mask": None}) * _keep(call)
    return chosen @ call["v"].repeat_interleave(h // g, 1)


def _soft(call: dict[str, Any]) -> Tensor:
    scale = call["scale"] / call["temperature"]
    q, k, v, mask = (call[name] for name in ("q", "k", "v", "mask"))
    o: Tensor = attnkit.softmax_attention(q, k, v, mask=mask, scale=scale, backend="reference")
    return o


def _no_gradient(call: dict[str, Any]) -> dict[str, Any]:
    return {name: call[name].detach() + 0 * call[name] for name in ("q", "k")}


def _interleaved(call: dict[str, Any]) -> dict[str, Any]:
    r = call["q"].shape[1] // call["k"].shape[1]
    return {name: call[name].repeat(1, r, 1, 1) for name in ("k", "v")}


def _from_zero(right: Any) -> Any:
    return lambda self, x, start: right(self, x, 0)


MUTANTS.calling("last_of_equals", "of equal scores the last one wins", _last_of_equals)
MUTANTS.calling("empty_rows_choose", "argmax of nothing is key 0, whose value is taken", _first_key_of_empty_rows)
MUTANTS.calling("mask_dropped", "mask lost on one road", lambda call: {"mask": None})
MUTANTS.running("masked_after", "masking after the choice", lambda spec: lambda **call: _masked_after(call, spec))
MUTANTS.calling("heads_interleaved", "query head i reads KV head i % g", _interleaved)
MUTANTS.running("soft_result", "soft weights in place of the choice", lambda spec: lambda **call: _soft(call))
MUTANTS.calling("no_gradient", "a choice without straight-through", _no_gradient)
MUTANTS.returning(
    "soft_values",
    "values get the gradient of soft weights",
    lambda call, o: (o - _soft(call)).detach() + _soft(call),
)
MUTANTS.calling("temperature_dropped", "the temperature accepted and ignored", lambda call: {"temperature": 1.0})
MUTANTS.calling("scale_dropped", "a scale that moves no choice is left out", lambda call: {"scale": 1.0})
MUTANTS.replacing("positions_restart", "each step counts positions from 0", HardAttention, "_project", _from_zero)
