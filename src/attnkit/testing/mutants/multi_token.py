"""Wrong programs of multi-token attention: kernels turned around, mixtures transposed or lost, queries not kept."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnkit.mechanisms.multi_token import layer
from attnkit.testing.mutants import Mutants

MUTANTS = Mutants()


def _flipped(axis: int) -> Any:
    return lambda call: {} if call["kernel"] is None else {"kernel": call["kernel"].flip(axis)}


def _transposed(call: dict[str, Any]) -> dict[str, Any]:
    shares = call["mix_logits"]
    return (
        {}
        if shares is None
        else {"mix_logits": shares.view(-1, shares.shape[1], shares.shape[1]).mT.reshape(shares.shape)}
    )


def _own_weights(call: dict[str, Any]) -> dict[str, Any]:
    shares = call["mix_weights"]
    if shares is None:
        return {}
    h, c = shares.shape
    # The true shares keep a gradient of zero, or the mutant would crash instead of being wrong.
    return {"mix_weights": torch.eye(c, dtype=shares.dtype).repeat(h // c, 1) + 0 * shares}


def _queries_forgotten(right: Any) -> Any:
    def step(q: Tensor, k: Tensor, v: Tensor, kernel: Tensor | None, *mixtures: Tensor | None) -> Any:
        before = 0 if kernel is None else kernel.shape[1] - 1
        return right(torch.cat([0 * q[:, :, :before], q[:, :, before:]], 2), k, v, kernel, *mixtures)

    return step


MUTANTS.calling("keys_flipped", "the kernel runs over keys from right to left", _flipped(2))
MUTANTS.calling("queries_flipped", "the kernel's first row is the query's own", _flipped(1))
MUTANTS.calling("mixture_transposed", "heads give where they should take", _transposed)
MUTANTS.calling("weights_not_mixed", "the mixture of weights is ignored", _own_weights)
MUTANTS.replacing(
    "queries_forgotten", "a step has no queries before its own", layer, "multi_token_attention_step", _queries_forgotten
)
