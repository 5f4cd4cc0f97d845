"""Wrong programs of interleaved head attention: order of pseudo tokens, rotary, window, mixtures, steps."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
from torch import Tensor

from attnkit.mechanisms import iha
from attnkit.mechanisms.iha import chunk, layer
from attnkit.spec import Mechanism
from attnkit.testing.mutants import Mutants

MUTANTS = Mutants()


def _number_by_number(spec: Mechanism) -> Any:
    """All tokens' first pseudo tokens, then all second ones."""

    def wrong(x: Tensor, mix: Tensor, **settings: Any) -> Tensor:
        right: Tensor = iha.pseudo_tokens(x, mix, **settings)
        moved: Tensor = right.unflatten(2, (-1, mix.shape[2])).transpose(2, 3).flatten(2, 3)
        return moved

    def forward(**call: Any) -> Tensor:
        with mock.patch.object(chunk, "pseudo_tokens", wrong):
            return chunk.forward(**call)

    return forward


def _turned_before(call: dict[str, Any]) -> dict[str, Any]:
    if call["rotary"] is None:
        return {}
    m, n = call["q"].shape[2], call["k"].shape[2]
    p, tokens = call["mix_q"].shape[2], torch.arange(n)
    q, k = call["rotary"].rotate(call["q"], tokens[n - m :] * p), call["rotary"].rotate(call["k"], tokens * p)
    return {"q": q, "k": k, "rotary": None}


def _window_in_pseudo_tokens(call: dict[str, Any]) -> dict[str, Any]:
    return {"window": call["window"] and -(-call["window"] // call["mix_q"].shape[2])}


def _number_first(call: dict[str, Any]) -> dict[str, Any]:
    shares, p = call["collapse"], call["mix_q"].shape[2]
    return {} if shares.shape[1] == p else {"collapse": shares.unflatten(1, (p, -1)).transpose(1, 2).flatten(1)}


def _transposed(call: dict[str, Any]) -> dict[str, Any]:
    return {"mix_q": call["mix_q"].transpose(0, 1)}


def _keys_mixed_as_queries(call: dict[str, Any]) -> dict[str, Any]:
    # The true mixture keeps a gradient of zero, or the mutant would crash instead of being wrong.
    return {"mix_k": call["mix_q"] + 0 * call["mix_k"]}


def _counted_in_tokens(right: Any) -> Any:
    def pseudo_tokens(x: Tensor, mix: Tensor, *, rotary: Any = None, start: int = 0) -> Any:
        return right(x, mix, rotary=rotary, start=start // mix.shape[2])

    return pseudo_tokens


def _ring_in_order(right: Any) -> Any:
    def step(*tensors: Tensor, positions: Tensor | None = None, **settings: Any) -> Any:
        return right(*tensors, positions=None if positions is None else positions.sort().values, **settings)

    return step


MUTANTS.running("number_by_number", "pseudo tokens in order of number and not of token", _number_by_number)
MUTANTS.calling("turned_before", "rotary before the mixture", _turned_before)
MUTANTS.calling("window_in_pseudo_tokens", "the window counts pseudo tokens", _window_in_pseudo_tokens)
MUTANTS.calling(
    "scale_with_p", "scale grows small with p", lambda call: {"scale": call["scale"] * call["mix_q"].shape[2] ** -0.5}
)
MUTANTS.calling("own_token_whole", "a flat order shows all of the own token", lambda call: {"causal": "token"})
MUTANTS.calling(
    "mixture_transposed", "heads give where they take", lambda call: {"mix_q": call["mix_q"].transpose(0, 1)}
)
MUTANTS.calling("number_first", "the collapse counts heads within a number", _number_first)
MUTANTS.calling("keys_mixed_as_queries", "one mixture for queries and keys", _keys_mixed_as_queries)
MUTANTS.replacing("counted_in_tokens", "steps count positions in tokens", layer, "pseudo_tokens", _counted_in_tokens)
MUTANTS.replacing("ring_in_order", "a wrapped ring is read in order", layer, "iha_attention_step", _ring_in_order)
