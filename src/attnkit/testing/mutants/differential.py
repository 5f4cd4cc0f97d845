"""Wrong programs of differential attention: signs, halves, scales and masks of one of two attentions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnkit.mechanisms.differential import DifferentialAttention
from attnkit.mechanisms.softmax import softmax_attention
from attnkit.spec import Mechanism
from attnkit.testing.mutants import Mutants

MUTANTS = Mutants()


def _crossed(call: dict[str, Any]) -> dict[str, Any]:
    return {"k": torch.cat(call["k"].chunk(2, -1)[::-1], -1)}


def _by_channel(call: dict[str, Any]) -> dict[str, Any]:
    return {name: torch.cat([call[name][..., ::2], call[name][..., 1::2]], -1) for name in ("q", "k")}


def _one_share(call: dict[str, Any]) -> dict[str, Any]:
    return {"share": call["share"][:1].expand_as(call["share"])}


def _summing_to_one(call: dict[str, Any], o: Tensor) -> Any:
    return o / (1 - call["share"].to(o.dtype)[:, None, None])


def _second_sees_all(spec: Mechanism) -> Any:
    def wrong(**call: Any) -> Any:
        half = call["q"].shape[3] // 2
        first = spec.reference(**{**call, "share": 0 * call["share"]})
        q, k = call["q"][..., half:], call["k"][..., half:]
        second = softmax_attention(q, k, call["v"], scale=call["scale"], backend="reference")
        return first - call["share"].to(second.dtype)[:, None, None] * second

    return wrong


def _from_position_0(right: Any) -> Any:
    return lambda self, x, start: right(self, x, 0)


MUTANTS.calling("added", "the second attention is added", lambda call: {"share": -call["share"]})
MUTANTS.calling("halves_crossed", "the first queries meet the second keys", _crossed)
MUTANTS.calling("halves_interleaved", "even channels are one half and odd ones the other", _by_channel)
MUTANTS.calling("scale_of_both", "the scale of both halves together", lambda call: {"scale": call["scale"] * 2**-0.5})
MUTANTS.calling("one_share", "the first head's share serves all", _one_share)
MUTANTS.returning("summing_to_one", "weights are divided by 1 - share", _summing_to_one)
MUTANTS.running("second_sees_all", "only the first attention is masked", _second_sees_all)
MUTANTS.replacing(
    "rotary_restarts", "each step rotates from position 0", DifferentialAttention, "_project", _from_position_0
)
