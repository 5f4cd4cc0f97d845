"""Wrong programs of NSA: what a block's importance counts, who selects, when a block is seen, whose keys are read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from attnkit.masks import window
from attnkit.mechanisms.nsa import layer
from attnkit.mechanisms.softmax import softmax_attention
from attnkit.state import View
from attnkit.testing.mutants import Mutants

MUTANTS = Mutants()


def _positions(call: dict[str, Any]) -> Tensor:
    m, n = call["q"].shape[2], call["k"].shape[2]
    return torch.arange(n - m, n)[:, None]


def _weights(call: dict[str, Any]) -> Tensor:
    """Weights (b, h, m, c) of the compression branch."""
    q, k, blocks = call["q"], call["compressed_k"], call["blocks"]
    ended = torch.arange(k.shape[2]) * blocks.stride + blocks.length - 1 <= _positions(call)
    scores = q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT * call["scale"]
    weights: Tensor = scores.masked_fill(~ended, -torch.inf).softmax(-1).masked_fill(~ended, 0.0)
    return weights


def _importance(call: dict[str, Any], at: Callable[[int, int, int], int]) -> Tensor:
    """What ``at(first stride of a block, m, n)`` collects for each block, for each query head (b, h, m, blocks)."""
    weights, blocks, n = _weights(call), call["blocks"], call["k"].shape[2]
    inside, found = blocks.block // blocks.stride, []
    for j in range(-(-n // blocks.block)):
        places = [at(inside * j, x, y) for x in range(inside) for y in range(blocks.length // blocks.stride)]
        found.append(weights[..., [i for i in places if 0 <= i < weights.shape[-1]]].sum(-1))
    return torch.stack(found, -1)


def _grouped(call: dict[str, Any], importance: Tensor) -> Tensor:
    r = call["q"].shape[1] // call["k"].shape[1]
    shared: Tensor = importance.unflatten(1, (-1, r)).sum(2).repeat_interleave(r, 1)
    return shared


def _selecting(name: str, mistake: str, importance: Callable[[dict[str, Any]], Tensor], local: int = 2) -> None:
    """A program that selects by ``importance(call)``, the first block and the last ``local`` ones before all others."""

    def forward(**call: Any) -> Any:
        ranks, blocks, positions = importance(call), call["blocks"], _positions(call)
        number, own = torch.arange(ranks.shape[-1]), positions // blocks.block
        ranks = ranks.masked_fill((number == 0) | (number > own - local), torch.inf)
        ranks = ranks.masked_fill(number > own, -torch.inf)
        best = ranks.argsort(dim=-1, descending=True, stable=True).argsort(-1) < blocks.selected
        keys = torch.arange(call["k"].shape[2])
        seen = best[..., keys // blocks.block] & (keys <= positions)
        return _joined(call, selected={"mask": seen})

    MUTANTS.running(name, mistake, lambda spec: forward)


def _joined(call: dict[str, Any], **changed: dict[str, Any]) -> Tensor:
    """The three branches by their gates; ``changed`` replaces settings of some."""
    blocks, gates = call["blocks"], call["gates"]
    ended = torch.arange(call["compressed_k"].shape[2]) * blocks.stride + blocks.length - 1 <= _positions(call)
    branches: dict[str, dict[str, Any]] = {
        "compressed": {"k": call["compressed_k"], "v": call["compressed_v"], "mask": ended},
        "selected": {"k": call["k"], "v": call["v"]},
        "window": {"k": call["window_k"], "v": call["window_v"], "mask": window(call["window"])},
    }
    o = torch.zeros(())
    for i, (name, settings) in enumerate(branches.items()):
        settings = {**settings, "scale": call["scale"], "backend": "reference", **changed.get(name, {})}
        o = o + gates[..., i, None] * softmax_attention(call["q"], **settings)
    return o


def _seen_too_early(call: dict[str, Any]) -> dict[str, Any]:
    """Every query one stride later than it is: the entries move forward by one."""
    moved = {
        name: torch.cat([call[name][:, :, 1:], call[name][:, :, -1:]], 2) for name in ("compressed_k", "compressed_v")
    }
    return moved if call["compressed_k"].shape[2] > 1 else {}


def _overlap(first: int, m: int, n: int) -> int:
    return first + m - n


def _right(call: dict[str, Any]) -> Tensor:
    return _grouped(call, _importance(call, _overlap))


def _printed(call: dict[str, Any]) -> Tensor:
    return _grouped(call, _importance(call, lambda first, m, n: first - m - n))


def _once(call: dict[str, Any]) -> Tensor:
    return _grouped(call, _importance(call, lambda first, m, n: -1 if m and n else first + m - n))


def _wider(call: dict[str, Any]) -> dict[str, Any]:
    return {"window": call["window"] + 1}


def _shared_keys(call: dict[str, Any]) -> dict[str, Any]:
    return {"window_k": call["k"], "window_v": call["v"]}


def _gates_over_sum(call: dict[str, Any]) -> dict[str, Any]:
    return {"gates": call["gates"] / call["gates"].sum(-1, keepdim=True)}


def _by_slot(right: Any) -> Any:
    def tokens(view: View, first: int) -> tuple[Tensor, Tensor]:
        new = view.positions >= first  # type: ignore[operator]
        return view.k[:, :, new], view.v[:, :, new]

    return tokens


_selecting("printed_offsets", "importance with the paper's offsets, which count from 1", _printed)
_selecting("heads_select_alone", "each query head selects by its own weights", lambda call: _importance(call, _overlap))
_selecting("each_overlap_once", "a compressed block counts once, however much of it lies in the block", _once)
_selecting("one_local_block", "the block before the own one has to earn its place", _right, local=1)
MUTANTS.calling("compressed_too_early", "a compressed block is seen a stride before its end", _seen_too_early)
MUTANTS.calling("window_without_self", "the window counts tokens before the query's own", _wider)
MUTANTS.calling("one_key_for_all", "the window branch reads the keys and values of the selected one", _shared_keys)
MUTANTS.calling("gates_sum_to_one", "gates are divided by their sum", _gates_over_sum)
MUTANTS.calling("gates_reversed", "the window's gate comes first", lambda call: {"gates": call["gates"].flip(-1)})
MUTANTS.replacing("ring_order", "tokens are compressed in the order of their slots", layer, "_since", _by_slot)
