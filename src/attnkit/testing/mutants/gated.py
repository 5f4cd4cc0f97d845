"""Wrong programs of gated attention: where the gate stands, whose it is, and what is taken of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnkit.mechanisms.gated import layer
from attnkit.spec import Mechanism
from attnkit.testing.mutants import Mutants

MUTANTS = Mutants()


def _opened(call: dict[str, Any]) -> dict[str, Any]:
    return {"gate": torch.full_like(call["gate"], 30.0)}


def _without_sigmoid(spec: Mechanism) -> Any:
    def wrong(**call: Any) -> Any:
        o = spec.reference(**{**call, **_opened(call)})
        return o * call["gate"].to(o.dtype)

    return wrong


def _of_values(spec: Mechanism) -> Any:
    """The gate of a key's token on its value; where queries and keys are the same tokens."""

    def wrong(**call: Any) -> Any:
        gate, v = call["gate"].sigmoid(), call["v"]
        if gate.shape[2] != v.shape[2]:
            return spec.reference(**call)
        shared = gate.unflatten(1, (v.shape[1], -1))[:, :, 0].to(v.dtype)
        return spec.reference(**{**call, **_opened(call), "v": v * shared})

    return wrong


def _heads_as_tokens(call: dict[str, Any]) -> dict[str, Any]:
    gate = call["gate"]
    b, h, m, c = gate.shape
    return {"gate": gate.transpose(1, 2).reshape(b, h, m, c)}


def _one_channel(call: dict[str, Any]) -> dict[str, Any]:
    return {"gate": call["gate"][..., :1]}


def _first_group(call: dict[str, Any]) -> dict[str, Any]:
    shared = call["q"].shape[1] // call["k"].shape[1]
    return {"gate": call["gate"][:, ::shared].repeat_interleave(shared, 1)}


def _of_the_first_token(right: Any) -> Any:
    def attend(self: Any, x: Tensor, *rest: Any) -> Tensor:
        result: Tensor = right(self, x[:, :1].expand_as(x), *rest)
        return result

    return attend


MUTANTS.running("no_sigmoid", "the gate multiplies as it is", _without_sigmoid)
MUTANTS.running("values_gated", "keys' tokens gate their values", _of_values)
MUTANTS.calling("heads_as_tokens", "(b, m, h, 1) is read as (b, h, m, 1)", _heads_as_tokens)
MUTANTS.calling("one_channel", "the first channel's gate serves all", _one_channel)
MUTANTS.calling("one_gate_a_group", "the first query head's gate serves its whole group", _first_group)
MUTANTS.calling("gate_dropped", "the gate is taken and ignored", _opened)
MUTANTS.replacing(
    "gate_of_the_first", "all tokens fed at once share the first one's gate", layer.GatedAttention, "_attend",
    _of_the_first_token,
)  # fmt: skip
