"""Wrong programs of the pyramid: index maps that look ahead, levels that are not chained, a state that forgets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from attnkit.mechanisms.hierarchical import chunk
from attnkit.state import PyramidState
from attnkit.testing.mutants import Mutants

MUTANTS = Mutants()


def _reading(index: Callable[[Tensor, int, int], Tensor]) -> Callable[[dict[str, Any], Tensor], Tensor]:
    """Each level read at ``index(position, stride, length)``, a position of the finest level."""

    def read(call: dict[str, Any], o: Tensor) -> Tensor:
        n, e = o.shape[2], call["v"].shape[3]
        i = torch.arange(n)
        levels = [part[:, :, index(i, 2**level, n)] for level, part in enumerate(o.split(e, 3))]
        return torch.cat(levels, 3)

    return read


def _interpolated(i: Tensor, stride: int, n: int) -> Tensor:
    return (i * -(-n // stride) // max(n, 1)) * stride


def _next_one(i: Tensor, stride: int, n: int) -> Tensor:
    return ((i + stride - 1) // stride * stride).clamp(max=(n - 1) // stride * stride)


def _own_heads(call: dict[str, Any]) -> dict[str, Any]:
    down = call["down"]
    return {"down": torch.cat([down[:, :1], 0 * down[:, 1:]], 1)}


def _shared_results(right: Any) -> Any:
    def select(self: PyramidState, rows: Tensor) -> Any:
        other = right(self, rows)
        if torch.equal(rows, torch.arange(len(rows))):
            other.results = self.results
        return other

    return select


def _from_zero(right: Any) -> Any:
    return lambda q, k, gains, rotary, level, first=0: right(q, k, gains, rotary, level)


def _consecutive(right: Any) -> Any:
    return lambda q, k, gains, rotary, level, first=0: right(q, k, gains, rotary, 0, first)


MUTANTS.returning(
    "interpolated", "levels stretched to the length, floor(i m / n), as by interpolation", _reading(_interpolated)
)
MUTANTS.returning("next_one", "a position takes a level's next token, not its last", _reading(_next_one))
MUTANTS.calling("one_head_up", "only the first head's result makes the next level", _own_heads)
MUTANTS.calling(
    "keys_unscaled",
    "logits of higher levels not divided",
    lambda call: {"k_weight": call["k_weight"] * call["q"].shape[3] ** 0.5},
)
MUTANTS.replacing("shared_results", "a fork holds its origin's results", PyramidState, "select", _shared_results)
MUTANTS.replacing("rotated_from_zero", "each step rotates from position 0", chunk, "turned", _from_zero)
MUTANTS.replacing("rotated_by_count", "a level's tokens stand side by side", chunk, "turned", _consecutive)
