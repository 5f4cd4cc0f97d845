"""Wrong programs of talking-heads attention: mixtures turned around, swapped or lost, and who may hear what."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnkit.mechanisms.talking_heads import TalkingHeadsAttention
from attnkit.testing.mutants import Mutants

MUTANTS = Mutants()


def _transposed(name: str) -> Any:
    return lambda call: {name: call[name] if call[name] is None else call[name].mT}


def _own(name: str) -> Any:
    # The true mixture keeps a gradient of zero, or the mutant would crash instead of being wrong.
    return lambda call: {name: call[name] if call[name] is None else torch.eye(*call[name].shape) + 0 * call[name]}


def _swapped(call: dict[str, Any]) -> dict[str, Any]:
    return {"mix_logits": call["mix_weights"], "mix_weights": call["mix_logits"]}


def _summing_to_one(call: dict[str, Any]) -> dict[str, Any]:
    shares = call["mix_weights"]
    return {"mix_weights": shares if shares is None else shares / shares.sum(1, keepdim=True)}


def _heard_anyway(call: dict[str, Any]) -> dict[str, Any]:
    mask = call["mask"]
    if mask is None or mask.heads == 1:
        return {}
    dense = mask.dense(call["q"].shape[2], call["k"].shape[2])
    return {"mask": _Any(dense.any(1, keepdim=True))}


class _Any:
    """A mask of all heads in which each sees what any of them sees."""

    def __init__(self, keep: Tensor) -> None:
        self.keep = keep

    def dense(self, m: int, n: int, device: Any = None) -> Tensor:
        return self.keep


def _from_position_0(right: Any) -> Any:
    return lambda self, x, start: right(self, x, 0)


MUTANTS.calling("logits_transposed", "heads give logits where they should take", _transposed("mix_logits"))
MUTANTS.calling("weights_transposed", "heads give weights where they should take", _transposed("mix_weights"))
MUTANTS.calling("logits_not_mixed", "the mixture of logits is ignored", _own("mix_logits"))
MUTANTS.calling("weights_not_mixed", "the mixture of weights is ignored", _own("mix_weights"))
MUTANTS.calling("mixtures_swapped", "logits are mixed as weights and weights as logits", _swapped)
MUTANTS.calling("summing_to_one", "mixed weights are normalised again", _summing_to_one)
MUTANTS.calling("heard_anyway", "a head hears from others of what it may not see", _heard_anyway)
MUTANTS.replacing(
    "rotary_restarts", "each step rotates from position 0", TalkingHeadsAttention, "_project", _from_position_0
)
