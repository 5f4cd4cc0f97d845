"""Wrong programs of HAN pooling: softmax over too much, padding that counts, the network without its bend."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnkit.testing.mutants import Mutants

MUTANTS = Mutants()


def _parts(call: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Scores of the words ``(b, n)``, and which sentence has which ``(b, s, n)``."""
    scores = torch.tanh(call["x"] @ call["weight"].T + call["offset"]) @ call["vector"]
    return scores, call["ids"][:, None] == torch.arange(call["sentences"])[:, None]


def _whole_document(spec: Any) -> Any:
    def run(**call: Any) -> Any:
        scores, member = _parts(call)
        shares = scores.masked_fill(~member.any(1), -1e4).softmax(-1)
        return (shares[:, None] * member) @ call["x"].masked_fill(~member.any(1)[..., None], 0)

    return run


def _hidden_afterwards(spec: Any) -> Any:
    def run(**call: Any) -> Any:
        scores, member = _parts(call)
        shares = scores[:, None].expand(member.shape).softmax(-1) * member
        return shares @ call["x"]

    return run


def _states_pooled(spec: Any) -> Any:
    def run(**call: Any) -> Any:
        scores, member = _parts(call)
        shares = torch.where(member, scores[:, None], -1e4).softmax(-1)
        return shares @ call["x"]

    return run


def _padding_in_last(call: dict[str, Any]) -> dict[str, Any]:
    return {"ids": call["ids"] % call["sentences"]}


MUTANTS.running("whole_document", "one softmax over all words of a document", _whole_document)
MUTANTS.running("hidden_afterwards", "words of other sentences struck out after the softmax", _hidden_afterwards)
MUTANTS.running("mean_of_nothing", "a sentence without words is the mean of all", _states_pooled)
MUTANTS.calling("padding_in_last", "index -1 is the last sentence", _padding_in_last)
MUTANTS.calling(
    "scaled",
    "scores divided by the root of the size",
    lambda call: {"vector": call["vector"] * len(call["vector"]) ** -0.5},
)
MUTANTS.calling("no_offset", "the offset inside the tanh is left out", lambda call: {"offset": 0 * call["offset"]})
