"""Checks of single attention calls, on the tensors they really get: each is right or wrong by itself."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from attnkit.parity.forward import left_padded
from attnkit.parity.mistakes import mistake
from attnkit.parity.record import Check, DoesNotApplyError, Finding, Lane, Verdict
from attnkit.parity.recording import Call, Judged, definition, recorded
from attnkit.parity.subject import Subject
from attnkit.testing.budgets import used

SHARP = 8.0
"""The largest score of a sharpened call: weights then differ by e^8, and still sum in float32 without loss."""


def _attention(subject: Subject, lane: Lane) -> Finding:
    largest = 0.0
    for kept in (None, left_padded(subject.ids)):
        for judged in recorded(subject, lane.backend, kept):
            for tried in (judged, _sharpened(judged)):
                finding = _one(tried)
                if finding.verdict is Verdict.CHANGED:
                    return finding
                largest = max(largest, finding.share or 0.0)
    return Finding(Verdict.ROUNDING, share=largest)


def _sharpened(judged: Judged) -> Judged:
    """The same call with queries so long that scores are large: a soft-cap, say, does nothing to small ones."""
    call = judged.call
    h, g = call.q.shape[1], call.k.shape[1]
    scores = call.q @ call.k.repeat_interleave(h // g, 1).transpose(2, 3) * call.scale
    wanted = max(SHARP, 2 * (call.settings.softcap or 0))
    q = call.q * (wanted / scores.abs().max().item())
    return replace(judged, call=replace(call, q=q, o=call.again(q, call.k, call.v)))


def _one(judged: Judged) -> Finding:
    call, visible = judged.call, judged.visible
    rows = visible.any(-1).expand(-1, call.q.shape[1], -1).transpose(1, 2)
    gold = definition(call.q.double(), call.k.double(), call.v.double(), visible, call.settings)
    naive = _naive(call, visible)
    use = used(call.o[rows], gold[rows], naive[rows], call.q.dtype, what=call.layer)
    if not use.problem:
        return Finding(Verdict.ROUNDING, share=use.share)
    why = mistake(judged, gold, naive)
    says = f"what it returns is explained by one mistake: {why}" if why else use.problem
    return Finding(Verdict.CHANGED, says, call.layer, use.share)


def _naive(call: Call, visible: Tensor) -> Tensor:
    """The definition in the call's own dtype, with the scale in the keys: another order of the same products."""
    return definition(call.q, call.k * call.scale, call.v, visible, replace(call.settings, scale=1.0))


def _visible_keys(subject: Subject, lane: Lane) -> Finding:
    return _probed(recorded(subject, lane.backend, left_padded(subject.ids)))


def _window_edges(subject: Subject, lane: Lane) -> Finding:
    n = subject.ids.shape[1]
    whole = recorded(subject, lane.backend)
    windows = sorted({w for w in map(_width, whole) if w is not None})
    if not windows:
        raise DoesNotApplyError(f"no layer has a window that {n} tokens reach past")
    near = {w + d for w in windows for d in (-1, 0, 1, 2)} | {2 * w + d for w in windows for d in (0, 1)}
    cuts = sorted({cut for cut in near if 0 < cut < n} | {n})
    return _probed([*whole, *recorded(subject, lane.backend, cuts=cuts)])


def _width(judged: Judged) -> int | None:
    """The most keys that a query sees, if it is fewer than there are."""
    most = int(judged.visible.sum(-1).max())
    return most if most < judged.visible.shape[-1] else None


def _probed(calls: Iterable[Judged]) -> Finding:
    """Compare what queries see, found by marking keys one at a time, with what they may see."""
    probed = 0
    for judged in calls:
        seen, call = _seen(judged.call), judged.call
        rows = judged.visible.any(-1, keepdim=True)
        wrong = ((seen != judged.visible) & rows).nonzero()
        probed += int(rows.sum())
        if len(wrong):
            b, h, i, j = wrong[0].tolist()
            i_sees, it_may = int(seen[b, h, i].sum()), int(judged.visible[b, 0, i].sum())
            at = judged.visible.shape[-1] - judged.visible.shape[-2] + i
            verb = "sees" if seen[b, h, i, j] else "does not see"
            says = f"row {b}: query {at} {verb} key {j}; it sees {i_sees} keys where it has to see {it_may}"
            return Finding(Verdict.CHANGED, says, call.layer)
    return Finding(Verdict.SAME, figures={"queries probed": probed})


def _seen(call: Call) -> Tensor:
    """Which keys each query gives weight to, ``(b, h, m, n)``: all scores are equal and values mark some keys."""
    if type(call.k) is not Tensor or type(call.v) is not Tensor:
        raise DoesNotApplyError("the cache hands keys over in a form of its own")
    n, e = call.v.shape[2:]
    q, k, found = torch.zeros_like(call.q), torch.zeros_like(call.k), []
    for start in range(0, n, e):
        v = torch.zeros_like(call.v)
        marked = torch.arange(start, min(start + e, n))
        v[:, :, marked, marked - start] = 1
        found.append(call.again(q, k, v)[..., : len(marked)] > 0)
    return torch.cat(found, -1).transpose(1, 2)


def _masked_rows(subject: Subject, lane: Lane) -> Finding:
    largest, count = 0.0, 0
    for judged in recorded(subject, lane.backend, left_padded(subject.ids)):
        blind = ~judged.visible.any(-1).expand(-1, judged.call.q.shape[1], -1).transpose(1, 2)
        o = judged.call.o[blind]
        count += len(o)
        if not o.isfinite().all():
            return Finding(Verdict.CHANGED, "a query that sees no key gets NaN or infinity", judged.call.layer)
        largest = max(largest, o.abs().max().item() if o.numel() else 0.0)
    if not count:
        raise DoesNotApplyError("every query sees a key")
    what = "gets 0" if not largest else f"gets up to {largest:.3g}, where attnkit and torch give 0"
    return Finding(Verdict.ROUNDING if largest else Verdict.SAME, f"a query that sees no key {what}")


CHECKS = (
    Check("attention", "every attention call against its definition, on the tensors it gets", _attention),
    Check("visible keys", "which keys each query gives weight to, in a batch padded on the left", _visible_keys),
    Check("window edges", "the same around the edge of each window, in one pass and with a cache", _window_edges),
    Check("fully masked rows", "what a query gets that sees no key", _masked_rows),
)
