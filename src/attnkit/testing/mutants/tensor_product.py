"""Wrong programs of tensor product attention: divisors, ranks and heads mixed up, and a step that forgets them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnkit.mechanisms.tensor_product import TensorProductAttention, layer
from attnkit.testing.mutants import Mutants

MUTANTS = Mutants()


def _scaled(name: str, by: int) -> Any:
    """Divide by the square root of the rank, or not at all."""
    return lambda call: {name: call[name] * call[name].shape[by] ** 0.5}


def _ranks_reversed(call: dict[str, Any]) -> dict[str, Any]:
    return {"b_k": call["b_k"].flip(1)}


def _values_weighed_by_keys(call: dict[str, Any]) -> dict[str, Any]:
    rank = call["a_v"].shape[3]
    # The true factors keep a gradient of zero, or the mutant would crash instead of being wrong.
    return {"a_v": call["a_k"][..., :1].expand(*call["a_k"].shape[:3], rank) + 0 * call["a_v"]}


def _first_vector_only(call: dict[str, Any]) -> dict[str, Any]:
    kept = torch.zeros_like(call["b_q"])
    kept[:, :1] = 1
    return {"b_q": call["b_q"] * kept}


def _without_positions(right: Any) -> Any:
    def factors(self: TensorProductAttention, x: Tensor, start: int) -> Any:
        return right(self, x, 0)

    return factors


def _step_without_rank(right: Any) -> Any:
    def step(*factors: Tensor) -> Tensor:
        found: Tensor = right(*factors) * factors[-1].shape[1]
        return found

    return step


MUTANTS.calling("root_of_rank", "queries divided by the root of the rank", _scaled("b_q", 1))
MUTANTS.calling("ranks_reversed", "a head's first share meets the last vector", _ranks_reversed)
MUTANTS.calling("values_weighed_by_keys", "values are added up by the shares of keys", _values_weighed_by_keys)
MUTANTS.calling("first_vector_only", "queries are made of their first vector", _first_vector_only)
MUTANTS.replacing(
    "position_zero",
    "a step rotates as if it stood at the start",
    TensorProductAttention,
    "_factors",
    _without_positions,
)
MUTANTS.replacing(
    "step_without_rank",
    "the step forgets the rank of values",
    layer,
    "tensor_product_attention_step",
    _step_without_rank,
)
