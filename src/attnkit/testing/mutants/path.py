"""Wrong programs of PaTH attention: which reflections lie between key and query, and keys that stay where they are."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnkit.state import RewrittenState
from attnkit.testing.mutants import Mutants

MUTANTS = Mutants()


def _by_its_own(call: dict[str, Any]) -> dict[str, Any]:
    k, w = call["k"], call["w"]
    return {"k": k - call["beta"][..., None] * (k * w).sum(-1, keepdim=True) * w}


def _shifted(call: dict[str, Any]) -> dict[str, Any]:
    def later(x: Tensor) -> Tensor:
        return torch.cat([torch.zeros_like(x[:, :, :1]), x[:, :, :-1]], 2)

    return {"w": later(call["w"]), "beta": later(call["beta"])}


def _reversed(call: dict[str, Any]) -> dict[str, Any]:
    # Key 0 and the last query then meet the same reflections in the opposite order.
    order = torch.arange(call["w"].shape[2] - 1, 0, -1)
    order = torch.cat([order.new_zeros(min(1, call["w"].shape[2])), order])
    return {"w": call["w"][:, :, order], "beta": call["beta"][:, :, order]}


def _times(call: dict[str, Any], by: float) -> Tensor | None:
    return None if call["log_f"] is None else call["log_f"] * by


def _keys_stay(right: Any) -> Any:
    def rewrite(self: RewrittenState, **tensors: Tensor) -> None:
        pass

    return rewrite


MUTANTS.calling("moved_by_its_own", "a key is reflected by its own token", _by_its_own)
MUTANTS.calling("query_not_counted", "the query's own reflection is left out", _shifted)
MUTANTS.calling("order_of_products", "reflections in the opposite order", _reversed)
MUTANTS.calling(
    "half_strength", "beta between 0 and 1: no negative eigenvalue", lambda call: {"beta": call["beta"] / 2}
)
MUTANTS.calling("gates_scaled", "the scale multiplies the gates", lambda call: {"log_f": _times(call, call["scale"])})
MUTANTS.replacing("keys_stay", "cached keys are not rewritten", RewrittenState, "rewrite", _keys_stay)
