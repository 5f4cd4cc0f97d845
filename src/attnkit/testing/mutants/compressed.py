"""Wrong programs of compressed attention: who sees which entry, under how many softmaxes, and what a state forgets."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnkit.mechanisms.compressed import compressor, layer
from attnkit.mechanisms.compressed.compressor import Compressor
from attnkit.state import CompressedState
from attnkit.testing.mutants import Mutants

MUTANTS = Mutants()


def _two_softmaxes(spec: Any) -> Any:
    """Tokens and entries each under a softmax of their own, added up."""

    def forward(**call: Any) -> Any:
        far = {**call, "kv": call["kv"] * 0, "window": 1}
        return spec.reference(**{**call, "entries": None, "rate": None, "chosen": None}) + spec.reference(**far)

    return forward


def _ring_one_short(right: Any) -> Any:
    def ring(self: CompressedState) -> Tensor:
        kept: Tensor = right(self)
        return torch.cat([torch.zeros_like(kept[:, :, :1]), kept[:, :, 1:]], 2)

    return ring


def _waiting_forgotten(right: Any) -> Any:
    def closed(self: CompressedState, name: str, *new: Tensor) -> Any:
        for kind in ("values", "gates"):
            self._buffers[f"{name}_{kind}"].zero_()
        return right(self, name, *new)

    return closed


def _nothing_before(right: Any) -> Any:
    def compress(*tensors: Tensor, overlap: bool, before: Any) -> Any:
        return right(*tensors, overlap=overlap)

    return compress


def _open_ranked(right: Any) -> Any:
    def choose(q: Tensor, k: Tensor, weights: Tensor, *, top: int, **settings: int) -> Tensor:
        scores = torch.einsum("biqw,biq->bqw", (q @ k[:, None].mT).relu(), weights)
        return scores.topk(min(top, k.shape[1])).indices

    return choose


def _shared_memory(right: Any) -> Any:
    def select(self: CompressedState, rows: Tensor) -> Any:
        other = right(self, rows)
        if torch.equal(rows, torch.arange(len(rows))):
            other._buffers = self._buffers
        return other

    return select


MUTANTS.calling(
    "entry_seen_early",
    "a query sees an entry from the first token of its window on",
    lambda call: {"length": call["length"] + call["rate"] - 1},
)
MUTANTS.calling("window_before_oneself", "the window counts tokens before", lambda call: {"window": call["window"] + 1})
MUTANTS.calling("no_sink", "the sink takes no weight", lambda call: {"sink": None})
MUTANTS.running("two_softmaxes", "tokens and entries have a softmax each", _two_softmaxes)
MUTANTS.replacing("ring_one_short", "the window loses its oldest vector", CompressedState, "_ring", _ring_one_short)
MUTANTS.replacing(
    "waiting_forgotten", "tokens that wait for their window are lost", CompressedState, "_closed", _waiting_forgotten
)
MUTANTS.replacing("shared_memory", "a fork writes into its origin", CompressedState, "select", _shared_memory)
MUTANTS.replacing(
    "entries_from_zero",
    "a step turns its entries as if they were the first",
    Compressor,
    "entries",
    lambda right: lambda self, closed, window, rotary: right(self, closed, 0, rotary),
)
MUTANTS.replacing(
    "positions_again",
    "rotary starts again with each step",
    layer.CompressedAttention,
    "_project",
    lambda right: lambda self, x, start: right(self, x, 0),
)
MUTANTS.replacing(
    "nothing_before", "a step's first entry has no window before", compressor, "compress", _nothing_before, preset="csa"
)
MUTANTS.replacing(
    "open_ranked", "open entries take places among the best", compressor, "choose", _open_ranked, preset="csa"
)
