"""Wrong programs of DeepSeek sparse attention: what a score is, how many are chosen, where a step starts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnkit.mechanisms.dsa import DSAttention
from attnkit.spec import Mechanism
from attnkit.testing.mutants import Mutants

MUTANTS = Mutants()


def _no_relu(spec: Mechanism) -> Any:
    def wrong(**call: Any) -> Any:
        # relu(x) - relu(-x) = x: each index head twice, the second with the opposite query and weight.
        twice = torch.cat([call["index_q"], -call["index_q"]], 1), torch.cat([call["index_w"], -call["index_w"]], 1)
        return spec.reference(**{**call, "index_q": twice[0], "index_w": twice[1]})

    return wrong


def _from_zero(right: Any) -> Any:
    def index(layer: DSAttention, x: Tensor, source: Tensor, start: int) -> Any:
        return right(layer, x, source, 0)

    return index


def _unsigned(call: dict[str, Any]) -> dict[str, Any]:
    return {"index_w": call["index_w"].abs()}


MUTANTS.running("no_relu", "products of the indexer are summed as they are", _no_relu)
MUTANTS.calling("one_more", "one key too many is chosen", lambda call: {"top": call["top"] + 1})
MUTANTS.calling("weights_positive", "weights of index heads lose their sign", _unsigned)
MUTANTS.calling(
    "keys_choose", "the weights of the next index head are taken", lambda c: {"index_w": c["index_w"].roll(1, 1)}
)
MUTANTS.replacing(
    "index_restarts", "each step counts the indexer's positions from zero", DSAttention, "_index", _from_zero
)
