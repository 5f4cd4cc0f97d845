"""Wrong programs of BigBird attention: blocks counted twice, drawn again, or lost at the ends."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnkit.masks import bigbird_layout, random_blocks
from attnkit.mechanisms.softmax import softmax_attention
from attnkit.testing.mutants import Mutants

MUTANTS = Mutants()


def _attended(call: dict[str, Any], counts: Tensor) -> Tensor:
    """Each key block counted as often as ``counts`` ``(h, blocks, blocks)`` says, by the logarithm in its logits."""
    q, keep = call["q"], call["keep"]
    of = torch.arange(q.shape[2]) // call["block"]
    bias = counts.to(q.dtype).log()[None, :, of[:, None], of].masked_fill(~keep[:, None, None], -torch.inf)
    o = softmax_attention(q, call["k"], call["v"], bias=bias, scale=call["scale"], backend="reference")
    found: Tensor = o.masked_fill(~keep[:, None, :, None], 0.0)
    return found


def _window_again(spec: Any) -> Any:
    def forward(**call: Any) -> Tensor:
        layout = bigbird_layout(call["random_blocks"], call["window"]).int()
        blocks = layout.shape[1]
        if blocks > 2:
            layout[:, 1, 0] += 1
            layout[:, -2, -1] += 1
        return _attended(call, layout)

    return forward


def _first_as_random(spec: Any) -> Any:
    def forward(**call: Any) -> Tensor:
        layout = bigbird_layout(torch.full_like(call["random_blocks"], -1), call["window"]).int()
        layout[:, 1:-1, 0] += call["random_blocks"].shape[2]
        return _attended(call, layout)

    return forward


def _changed(call: dict[str, Any], change: Any) -> Tensor:
    layout = bigbird_layout(call["random_blocks"], call["window"])
    if layout.shape[1] > 2:
        layout = change(layout.clone())
    return _attended(call, layout)


def _local_last(layout: Tensor) -> Tensor:
    layout[:, :-2, -1] = False
    return layout


def _sparse_first(layout: Tensor) -> Tensor:
    layout[:, 0, 2:-1] = False
    return layout


def _transposed(layout: Tensor) -> Tensor:
    return layout.transpose(1, 2)


def _drawn_again(call: dict[str, Any]) -> dict[str, Any]:
    heads, blocks, random = call["random_blocks"].shape
    return {"random_blocks": random_blocks(blocks, random=random, heads=heads, seed=10_000)}


def _one_head(call: dict[str, Any]) -> dict[str, Any]:
    return {"random_blocks": call["random_blocks"][:1].expand_as(call["random_blocks"])}


def _changing(change: Any) -> Any:
    return lambda spec: lambda **call: _changed(call, change)


MUTANTS.running("window_again", "global blocks within the window counted twice", _window_again)
MUTANTS.running("first_as_random", "the first block for every random one, once more each", _first_as_random)
MUTANTS.running("local_last", "the last block not seen by all", _changing(_local_last))
MUTANTS.running("sparse_first", "the first block does not see all", _changing(_sparse_first))
MUTANTS.running("transposed", "random blocks of keys taken for those of queries", _changing(_transposed))
MUTANTS.calling("drawn_again", "other random blocks than those given", _drawn_again)
MUTANTS.calling("one_head", "the first head's random blocks for all", _one_head)
MUTANTS.calling("padding_read", "padding read", lambda call: {"keep": torch.ones_like(call["keep"])})
MUTANTS.calling("scaled_twice", "the scale twice", lambda call: {"q": call["q"] * call["scale"]})
