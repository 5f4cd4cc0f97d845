"""Wrong programs of H-Transformer-1D, the first three from code in circulation; and a state that mixes up its sums."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from attnkit.mechanisms.h_transformer import chunk, layer
from attnkit.state import SummaryState
from attnkit.testing.mutants import Mutants

MUTANTS = Mutants()


def _changed(name: str, wrong: Callable[[Any], Any]) -> Callable[[Any], Callable[..., Any]]:
    """The levelwise form with one of its functions replaced."""

    def run(**call: Any) -> Any:
        with mock.patch.object(chunk, name, wrong(getattr(chunk, name))):
            return chunk.forward(**call)

    return lambda spec: run


def _queries_averaged(right: Any) -> Any:
    def weighed(q: Tensor, k: Tensor, v: Tensor, sizes: tuple[int, int], causal: bool, scale: float) -> Any:
        size = sizes[0] // sizes[1]
        means = q.unflatten(2, (-1, size)).mean(3).repeat_interleave(size, 2)
        return right(means, k, v, sizes, causal, scale)

    return weighed


def _shared_sums(right: Any) -> Any:
    def select(self: SummaryState, rows: Tensor) -> Any:
        other = right(self, rows)
        if torch.equal(rows, torch.arange(len(rows))):
            other._sums = self._sums
        return other

    return select


def _counted_once(right: Any) -> Any:
    return lambda q, k, v, counts: right(q, k, v, torch.ones_like(counts))


def _added(right: Any) -> Any:
    return lambda top, sums, other_top, other: (top, sums + other)


MUTANTS.running(
    "counted_once",
    "a summary of 2^l tokens counts as one key",
    _changed("_pairs", lambda right: lambda x: right(x) / 2),
)
MUTANTS.running("own_largest_logit", "each level subtracts a largest logit of its own", _changed("_joined", _added))
MUTANTS.running("queries_averaged", "causal queries averaged with later ones", _changed("_weighed", _queries_averaged))
MUTANTS.calling("wide_blocks", "blocks twice as long", lambda call: {"block": 2 * call["block"]})
MUTANTS.replacing("shared_sums", "a fork adds to its origin's sums", SummaryState, "select", _shared_sums)
MUTANTS.replacing(
    "steps_count_once", "a step counts sums as one key", layer, "h_transformer_attention_step", _counted_once
)
