"""Wrong programs of MoBA: what is ranked, who ranks, how many blocks stay, how their parts are joined."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from attnkit.masks import causal
from attnkit.mechanisms.softmax import softmax_attention
from attnkit.state import pooled
from attnkit.testing.mutants import Mutants

MUTANTS = Mutants()


def _blocks(call: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Number of each query's block ``(m, 1)`` and of each key's ``(n,)``."""
    m, n, block = call["q"].shape[2], call["k"].shape[2], call["block"]
    return torch.arange(n - m, n)[:, None] // block, torch.arange(n) // block


def _gates(call: dict[str, Any], reduce: Callable[[Tensor], Tensor] = lambda keys: keys.mean(3)) -> Tensor:
    """Gates (b, h, m, c) of all blocks, the last one filled up with zeros."""
    q, k, block = call["q"], call["k"].repeat_interleave(call["q"].shape[1] // call["k"].shape[1], 1), call["block"]
    filled = torch.nn.functional.pad(k, (0, 0, 0, -k.shape[2] % block))
    gates: Tensor = q @ reduce(filled.unflatten(2, (-1, block))).mT
    return gates


def _chosen(call: dict[str, Any], gates: Tensor, count: int, among: Tensor, last: bool = False) -> Tensor:
    """The ``count`` best blocks of those ``among``, bool (b, h, m, c); of equals the first, or the last."""
    gates = gates.masked_fill(~among, -torch.inf)
    if last:
        return _chosen(call, gates.flip(-1), count, among.flip(-1)).flip(-1)
    return (gates.argsort(dim=-1, descending=True, stable=True).argsort(-1) < count) & among


def _seeing(name: str, mistake: str, chosen: Callable[[dict[str, Any]], Tensor], own: bool = True) -> None:
    """A program that attends to the blocks ``chosen(call)``, (b, h, m, c), and its own."""

    def forward(**call: Any) -> Any:
        rows, keys = _blocks(call)
        seen = chosen(call)[..., keys] | ((rows == keys) & own)
        keep = seen & causal().dense(call["q"].shape[2], call["k"].shape[2])
        q, k, v, scale = (call[name] for name in ("q", "k", "v", "scale"))
        return softmax_attention(q, k, v, mask=keep, scale=scale, backend="reference")

    MUTANTS.running(name, mistake, lambda spec: forward)


def _past(call: dict[str, Any]) -> Tensor:
    rows, keys = _blocks(call)
    return torch.arange(int(keys[-1]) + 1) < rows


def _one_choice_a_group(call: dict[str, Any]) -> Tensor:
    r = call["q"].shape[1] // call["k"].shape[1]
    return _chosen(call, _gates(call)[:, ::r].repeat_interleave(r, 1), call["top"] - 1, _past(call))


def _own_is_ranked(call: dict[str, Any]) -> Tensor:
    rows, keys = _blocks(call)
    return _chosen(call, _gates(call), call["top"], torch.arange(int(keys[-1]) + 1) <= rows)


def _parts_averaged(**call: Any) -> Tensor:
    """A softmax of its own for the own block and for the chosen ones, and the mean of the two."""
    rows, keys = _blocks(call)
    far = _chosen(call, _gates(call), call["top"] - 1, _past(call))[..., keys]
    near = (rows == keys) & causal().dense(call["q"].shape[2], call["k"].shape[2])
    q, k, v, scale = (call[name] for name in ("q", "k", "v", "scale"))
    parts = [softmax_attention(q, k, v, mask=x, scale=scale, backend="reference") for x in (near, far)]
    o: Tensor = torch.where(far.any(-1, keepdim=True), (parts[0] + parts[1]) / 2, parts[0])
    return o


def _too_early(right: Any) -> Any:
    return lambda length, size, stride: right(length + 1, size, stride) if length else 0


def _from_the_first(right: Any) -> Any:
    return lambda state: range(len(right(state)))


_seeing(
    "own_block_not_counted",
    "the best blocks come on top of the own one",
    lambda call: _chosen(call, _gates(call), call["top"], _past(call)),
)
_seeing(
    "last_of_equals",
    "of equal gates the later block wins",
    lambda call: _chosen(call, _gates(call), call["top"] - 1, _past(call), last=True),
)
_seeing(
    "first_key_for_the_block",
    "a block is ranked by its first key and not by the mean",
    lambda call: _chosen(call, _gates(call, lambda keys: keys[:, :, :, 0]), call["top"] - 1, _past(call)),
)
_seeing("one_choice_a_group", "the first query head chooses for its whole group", _one_choice_a_group)
_seeing("own_block_is_ranked", "the own block is one of those ranked, by a mean that holds the future", _own_is_ranked,
        own=False)  # fmt: skip
MUTANTS.running("parts_averaged", "the parts of a query are averaged and not joined", lambda spec: _parts_averaged)
MUTANTS.replacing("mean_too_early", "a block's mean is taken before its last key", pooled, "pools", _too_early)
MUTANTS.replacing(
    "first_blocks_again", "a step takes the means of the first blocks", pooled.PooledState, "due", _from_the_first
)
