"""Wrong programs of gated linear attention: what a gate multiplies, when, and what a step starts from."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from attnkit.mechanisms.gla import layer
from attnkit.recurrence import recurrent
from attnkit.spec import Mechanism
from attnkit.testing.mutants import Mutants

MUTANTS = Mutants()


def _shifted(call: dict[str, Any]) -> dict[str, Any]:
    decay = call["log_decay"]
    return {"log_decay": torch.cat([torch.zeros_like(decay[:, :, :1]), decay[:, :, :-1]], 2)}


def _one_gate(spec: Mechanism) -> Any:
    def forward(**call: Any) -> Tensor:
        q, k, v, decay = (call[name] for name in ("q", "k", "v", "log_decay"))
        mean = decay if decay.dim() == 3 else decay.mean(-1)
        return recurrent(q, k, v, mean, keep=call["keep"], scale=call["scale"])[0]

    return forward


def _fresh(right: Any) -> Any:
    def held(state: Any) -> Tensor:
        return torch.zeros_like(right(state))

    return held


def _untempered(right: Any) -> Any:
    def project(self: Any, x: Tensor) -> Any:
        q, k, v, log_decay = right(self, x)
        return q, k, v, log_decay * (1.0 if x.shape[1] > 1 else self.config.temper)

    return project


def _scaled_gates(call: dict[str, Any]) -> dict[str, Any]:
    return {"log_decay": call["log_decay"] * call["scale"]}


MUTANTS.calling("gates_a_token_late", "a token fades by the gate of the one before", _shifted)
MUTANTS.calling("gates_base_2", "logarithms in base 2", lambda call: {"log_decay": call["log_decay"] / math.log(2)})
MUTANTS.calling("gates_scaled", "the scale multiplies the gates", _scaled_gates)
MUTANTS.running("one_gate_a_token", "all channels fade by the mean of their gates", _one_gate)
MUTANTS.replacing("state_lost", "each step starts from nothing", layer, "_held", _fresh)
MUTANTS.replacing(
    "step_without_temper", "gates of a single step lack the power", layer.GatedLinearAttention, "_project", _untempered
)
