"""Checks of one forward pass: every layer's output and the logits, with padding, packed, alone and in a batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnkit.parity.record import Check, Finding, Lane, Verdict
from attnkit.parity.subject import Subject, hidden_states
from attnkit.testing.budgets import used

Trace = dict[str, Tensor]
LOGITS = "logits"


def traced(model: Any, ids: Tensor, kept: Tensor | None = None, **options: Any) -> Trace:
    """Hidden states of every layer and the logits, ``(tokens, ...)``, of the tokens of ``ids`` that ``kept`` keeps."""
    with torch.no_grad(), hidden_states(model) as seen:
        logits = model(ids, attention_mask=kept, use_cache=False, **options).logits
    keep = torch.ones_like(ids, dtype=torch.bool) if kept is None else kept.bool()
    found = {name: calls[0] for name, calls in seen.items() if calls[0].shape[:2] == ids.shape}
    return {name: x[keep] for name, x in (found | {LOGITS: logits}).items()}


def judged(got: Trace, gold: Trace, naive: Trace, dtype: torch.dtype) -> Finding:
    """The verdict over every tensor of a trace, in order; the first one out of its budget is named."""
    largest = 0.0
    for name, tensor in got.items():
        use = used(tensor, gold[name].double(), naive[name], dtype, through_layers=True, what=name)
        if use.problem:
            return Finding(Verdict.CHANGED, use.problem, name, use.share)
        largest = max(largest, use.share)
    same = all(torch.equal(tensor, naive[name]) for name, tensor in got.items())
    return Finding(Verdict.SAME if same else Verdict.ROUNDING, share=largest)


def left_padded(ids: Tensor) -> Tensor:
    """Which tokens ``(b, n)`` are kept when the first quarter of every other row is padding."""
    kept = torch.ones_like(ids)
    kept[::2, : ids.shape[1] // 4] = 0
    return kept


def _layers(subject: Subject, lane: Lane) -> Finding:
    gold, naive = subject.expected("layers", lambda model: traced(model, subject.ids))
    with subject.under(lane.backend) as model:
        return judged(traced(model, subject.ids), gold, naive, subject.dtype)


def _left_padding(subject: Subject, lane: Lane) -> Finding:
    kept = left_padded(subject.ids)
    gold, naive = subject.expected("left padding", lambda model: traced(model, subject.ids, kept))
    with subject.under(lane.backend) as model:
        return judged(traced(model, subject.ids, kept), gold, naive, subject.dtype)


CHECKS = (
    Check("layers", "hidden states of every layer, and the logits", _layers),
    Check("left padding", "the same for the tokens of a batch padded on the left", _left_padding),
)
