"""Checks of a model that reads its text piece by piece, with a cache."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from itertools import pairwise
from math import inf
from typing import Any

import torch

from attnkit.hf.names import as_cache
from attnkit.parity.caches import PLAIN, cache
from attnkit.parity.forward import LOGITS, Trace, judged, left_padded
from attnkit.parity.record import Check, Finding, Lane
from attnkit.parity.subject import Subject, hidden_states
from attnkit.parity.text import Said, bounds, compared


def read(model: Any, subject: Subject, cuts: Iterable[int], name: str) -> Trace:
    """What ``traced`` returns, of text that is padded on the left and read in pieces that end at ``cuts``."""
    ids, kept = subject.ids, left_padded(subject.ids)
    held, logits = cache(name, model.config, ids.shape[1] + 1), []
    with torch.no_grad(), hidden_states(model) as seen:
        for start, end in pairwise((0, *cuts)):
            out = model(ids[:, start:end], attention_mask=kept[:, :end], use_cache=True, **as_cache(model, held))
            logits.append(out.logits)
    found = {name: torch.cat(calls, 1) for name, calls in seen.items() if all(x.dim() == 3 for x in calls)}
    return {name: x[kept.bool()] for name, x in (found | {LOGITS: torch.cat(logits, 1)}).items()}


def _compared(subject: Subject, lane: Lane, key: str, cuts: tuple[int, ...]) -> Finding:
    name = lane.cache
    assert name is not None

    def plain(other: str) -> Trace:
        return subject.plain(f"{key}, {other}", lambda model: read(model, subject, cuts, other))

    gold = subject.true(key, lambda model: read(model, subject, cuts, "dynamic"))
    got = subject.tried(lane.backend, f"{key}, {name}", lambda model: read(model, subject, cuts, name))
    if name not in PLAIN:
        return judged(got, gold, plain("dynamic"), subject.dtype)
    right = gold[LOGITS]
    likeliest = right.argmax(-1)  # whose perplexity only ever gets worse, so that it is no measure here
    truth = Said.of(right, likeliest)
    allowed = bounds(subject, name, truth, lambda other: Said.of(plain(other)[LOGITS], likeliest))
    return compared(Said.of(got[LOGITS], likeliest), truth, replace(allowed, perplexity=inf))


def _decode(subject: Subject, lane: Lane) -> Finding:
    n = subject.ids.shape[1]
    return _compared(subject, lane, "decode", (n // 2, *range(n // 2 + 1, n + 1)))


def _chunked(subject: Subject, lane: Lane) -> Finding:
    n = subject.ids.shape[1]
    return _compared(subject, lane, "chunked prefill", (n // 3, n // 3 + 1, 2 * n // 3 - 1, n - 2, n))


CHECKS = (
    Check("chunked prefill", "text padded on the left, read in uneven pieces", _chunked, cached=True),
    Check("decode", "tokens read one at a time after a prompt padded on the left", _decode, cached=True),
)
