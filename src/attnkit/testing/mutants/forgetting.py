"""Wrong programs of forgetting attention: which gates a key pays, in which unit, and what a state forgets to carry."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from attnkit.mechanisms.forgetting import layer
from attnkit.testing.mutants import Mutants

MUTANTS = Mutants()


def _own_gate(call: dict[str, Any]) -> dict[str, Any]:
    log_f = call["log_f"]
    return {"log_f": torch.cat([torch.zeros_like(log_f[..., :1]), log_f[..., :-1]], -1)}


def _summed_in_half(call: dict[str, Any]) -> dict[str, Any]:
    total = call["log_f"].cumsum(-1).bfloat16().to(call["log_f"].dtype)
    return {"log_f": total.diff(dim=-1, prepend=torch.zeros_like(total[..., :1]))}


def _one_gate_a_group(call: dict[str, Any]) -> dict[str, Any]:
    shared = call["q"].shape[1] // call["k"].shape[1]
    return {"log_f": call["log_f"][:, ::shared].repeat_interleave(shared, 1)}


def _from_zero(right: Any) -> Any:
    def continued(state: Any, log_f: Tensor) -> Tensor:
        return log_f.cumsum(-1, dtype=state.view()["total"].dtype)

    return continued


MUTANTS.calling("own_gate", "a key pays the gate of its own token and not the query's", _own_gate)
MUTANTS.calling("gates_base_2", "logarithms in base 2", lambda call: {"log_f": call["log_f"] / math.log(2)})
MUTANTS.calling("gates_scaled", "the scale multiplies the gates", lambda call: {"log_f": call["log_f"] * call["scale"]})
MUTANTS.calling("sums_in_bfloat16", "gates are summed in half precision", _summed_in_half)
MUTANTS.calling("one_gate_a_group", "the first query head's gate serves its whole group", _one_gate_a_group)
MUTANTS.replacing("sums_restart", "each step counts its gates from zero", layer, "_continued", _from_zero)
