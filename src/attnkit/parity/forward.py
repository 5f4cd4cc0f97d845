"""Checks of one forward pass: every layer's output and the logits, with padding, packed, alone and in a batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from attnkit.parity.record import Check, Finding, Lane, Verdict
from attnkit.parity.subject import Subject, hidden_states, layers
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


def judged(got: Trace, gold: Trace, naive: Trace, dtype: torch.dtype, *, gradient: bool = False) -> Finding:
    """The verdict over every tensor of a trace, in order; the first one out of its budget is named."""
    largest = 0.0
    for depth, (name, tensor) in enumerate(got.items(), 1):
        use = used(tensor, gold[name].double(), naive[name], dtype, gradient=gradient, depth=depth, what=name)
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


def right_padded(ids: Tensor) -> Tensor:
    """The same with the padding at the end."""
    return left_padded(ids).flip(1)


def _compared(
    subject: Subject, lane: Lane, key: str, run: Callable[[Any], Trace], *, gradient: bool = False
) -> Finding:
    gold, naive = subject.true(key, run), subject.plain(key, run)
    return judged(subject.tried(lane.backend, key, run), gold, naive, subject.dtype, gradient=gradient)


def _layers(subject: Subject, lane: Lane) -> Finding:
    return _compared(subject, lane, "layers", lambda model: traced(model, subject.ids))


def _left_padding(subject: Subject, lane: Lane) -> Finding:
    kept = left_padded(subject.ids)
    return _compared(subject, lane, "left padding", lambda model: traced(model, subject.ids, kept))


def _right_padding(subject: Subject, lane: Lane) -> Finding:
    kept = right_padded(subject.ids)
    return _compared(subject, lane, "right padding", lambda model: traced(model, subject.ids, kept))


def _packed(subject: Subject, lane: Lane) -> Finding:
    rows, n = subject.ids.shape
    lengths = (n // 2 - 2, n // 3, n - (n // 2 - 2) - n // 3)
    positions = torch.cat([torch.arange(length) for length in lengths]).repeat(rows, 1)
    return _compared(subject, lane, "packed", lambda model: traced(model, subject.ids, position_ids=positions))


def _alone(subject: Subject, lane: Lane) -> Finding:
    """A row by itself against the truth, and whether it has the bits that it has in the batch."""
    row = subject.ids[:1]
    finding = _compared(subject, lane, "alone", lambda model: traced(model, row))
    if finding.verdict is Verdict.CHANGED:
        return finding
    with subject.under(lane.backend) as model:
        batch, alone = traced(model, subject.ids), traced(model, row)
    same = all(torch.equal(batch[name][: len(x)], x) for name, x in alone.items())
    says = f"a row alone has {'the' if same else 'other'} bits {'that it has' if same else 'than'} in a batch"
    return Finding(finding.verdict, says, share=finding.share)


def _gradients(subject: Subject, lane: Lane) -> Finding:
    ids, kept = subject.ids, left_padded(subject.ids)
    # The last padding token would be asked for the first real one, and what padding computes is nobody's business.
    asked = (kept * kept.roll(1, 1)).bool()

    def run(model: Any) -> Trace:
        model.zero_grad(set_to_none=True)
        with torch.enable_grad():
            model(ids, attention_mask=kept, labels=ids.where(asked, -100), use_cache=False).loss.backward()
        found = _by_layer(model)
        model.zero_grad(set_to_none=True)
        return found

    return _compared(subject, lane, "gradients", run, gradient=True)


def _by_layer(model: Any) -> Trace:
    """Every gradient, those of a layer's parameters together: those of single ones may be all cancellation.

    Backwards, as gradients go, so that the first one out of its budget is where it began.
    """
    names, parts = list(layers(model)), dict[str, list[Tensor]]()
    for name, parameter in reversed(list(model.named_parameters())):
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad  # an expert that rested
        home = next((layer for layer in names if name.startswith(f"{layer}.")), name)
        parts.setdefault(home, []).append(gradient.detach().flatten())
    return {home: torch.cat(found) for home, found in parts.items()}


CHECKS = (
    Check("layers", "hidden states of every layer, and the logits", _layers),
    Check("left padding", "the same for the tokens of a batch padded on the left", _left_padding),
    Check("right padding", "the same with the padding on the right", _right_padding),
    Check("packed", "the same for documents packed into one row, by positions that restart", _packed),
    Check("alone", "the same for a row alone, and whether its bits are those it has in a batch", _alone),
    Check("gradients", "the gradient of every parameter, with padding on the left", _gradients),
)
