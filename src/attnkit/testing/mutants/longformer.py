"""Wrong programs of Longformer attention: keys counted twice, the wrong projections, rows that stay local."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnkit.mechanisms.longformer import rows
from attnkit.mechanisms.softmax import softmax_attention
from attnkit.testing.mutants import Mutants

MUTANTS = Mutants()


def _at(x: Tensor, positions: Tensor) -> Tensor:
    return x.gather(2, positions.clamp(min=0)[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))


def _sees(call: dict[str, Any], radius: int) -> Tensor:
    i = torch.arange(call["q"].shape[2])
    sees: Tensor = ((i[:, None] - i).abs() <= radius) & call["keep"][:, None]
    return sees


def _counted_twice(spec: Any) -> Any:
    def forward(**call: Any) -> Tensor:
        q, k, v, places = (call[name] for name in ("q", "k", "v", "global_positions"))
        none = (places < 0)[:, None].expand(-1, q.shape[2], -1)
        sees = torch.cat([_sees(call, call["radius"]), ~none], -1)
        beside = (torch.cat([x, _at(x, places)], 2) for x in (k, v))
        bias = torch.zeros(sees.shape, dtype=q.dtype).masked_fill(~sees, -torch.inf)[:, None]
        local = softmax_attention(q, *beside, bias=bias, scale=call["scale"], backend="reference")
        return _with_global_rows(call, local)

    return forward


def _two_softmaxes(spec: Any) -> Any:
    def forward(**call: Any) -> Tensor:
        q, k, v, places = (call[name] for name in ("q", "k", "v", "global_positions"))
        rest = _sees(call, call["radius"]) & ~rows.marks(places, q.shape[2])[:, None]
        local = softmax_attention(q, k, v, mask=rest, scale=call["scale"], backend="reference")
        listed = (places >= 0)[:, None].expand(-1, q.shape[2], -1)
        k, v = _at(k, places), _at(v, places)
        local = local + softmax_attention(q, k, v, mask=listed, scale=call["scale"], backend="reference")
        return _with_global_rows(call, local)

    return forward


def _with_global_rows(call: dict[str, Any], local: Tensor) -> Tensor:
    q, k, v = (call[f"global_{name}"] for name in "qkv")
    sees = call["keep"][:, None].expand(-1, q.shape[2], -1)
    found = softmax_attention(q, k, v, mask=sees, scale=call["scale"], backend="reference")
    return rows.placed(local, found, call["global_positions"], call["keep"])


def _global_unscaled(call: dict[str, Any]) -> dict[str, Any]:
    return {"global_q": call["global_q"] / call["scale"]}


def _first_sequence(call: dict[str, Any]) -> dict[str, Any]:
    return {"global_positions": call["global_positions"][:1].expand_as(call["global_positions"])}


MUTANTS.running("counted_twice", "global keys within the window counted twice", _counted_twice)
MUTANTS.running("two_softmaxes", "a softmax for the window and one for global keys, added", _two_softmaxes)
MUTANTS.calling("narrow_window", "windows one short", lambda call: {"radius": max(0, call["radius"] - 1)})
MUTANTS.calling(
    "local_query", "global tokens ask with q", lambda call: {"global_q": _at(call["q"], call["global_positions"])}
)
MUTANTS.calling(
    "local_values", "global tokens read k and v", lambda call: {"global_k": call["k"], "global_v": call["v"]}
)
MUTANTS.calling("global_unscaled", "global rows without the scale", _global_unscaled)
MUTANTS.calling("first_sequence", "the first sequence's global tokens for all of a batch", _first_sequence)
MUTANTS.calling("padding_read", "padding read", lambda call: {"keep": torch.ones_like(call["keep"])})
