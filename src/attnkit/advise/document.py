"""The answer as plain data, for JSON."""

from __future__ import annotations

from typing import Any

from attnkit.advise.answer import Answer
from attnkit.advise.ranking import Judged
from attnkit.advise.roofline import Column, Time
from attnkit.advise.sentences import asked, backend, headline, hints, mechanism, reasons


def document(answer: Answer) -> dict[str, Any]:
    """Everything that the answer says; bytes are whole numbers, times seconds."""
    model, hardware, load = answer.model, answer.hardware, answer.load
    return {
        "answer": headline(answer),
        "asked": asked(answer),
        "decision": {
            "chosen": answer.decision.chosen,
            "meets": answer.chosen.meets,
            "rejected": {name: list(why) for name, why in answer.decision.rejected.items()},
        },
        "model": {
            "name": model.name,
            "family": model.family,
            "weights": model.weights,
            "weight_bytes": model.weight_bytes,
            "active_weights": model.active,
            "dtype": model.dtype,
            "token_bytes": model.token_bytes(load.source),
            "layers": model.shape,
            "longest": model.longest,
            "unknown_keys": list(model.unknown),
            "ignored_keys": list(model.ignored),
            "notes": list(model.notes),
        },
        "hardware": {
            "name": hardware.name,
            "title": hardware.title,
            "kind": hardware.kind,
            "memory": int(hardware.memory),
            "bandwidth": hardware.bandwidth,
            "rates": dict(hardware.rates),
            "source": hardware.source,
            "measured": hardware.measured,
        },
        "lengths": {**load.lengths.columns, "mean": round(load.lengths.mean)},
        "concurrency": load.concurrency,
        "targets": dict(answer.wanted.targets),
        "alternatives": [_judged(answer, one) for one in answer.ranked],
        "unsuited": [{"name": one.name, "title": one.title, "why": one.why} for one in answer.unsuited],
        "hints": list(hints(answer)),
    }


def _judged(answer: Answer, judged: Judged) -> dict[str, Any]:
    one, estimate = judged.alternative, judged.estimate
    return {
        "name": one.name,
        "title": one.title,
        "effort": one.effort,
        "quality": one.quality,
        "how": one.how,
        "mechanism": mechanism(one),
        "backend": backend(answer, one),
        "meets": judged.meets,
        "why_not": reasons(answer, one.name) or None,
        "weights": estimate.weights,
        "activations": estimate.activations,
        "free": estimate.free,
        "needed": estimate.needed,
        "token_bytes": estimate.token,
        "columns": [_column(column) for column in estimate.columns],
    }


def _column(column: Column) -> dict[str, Any]:
    return {
        "name": column.name,
        "tokens": column.tokens,
        "cache": column.cache,
        "reserved": column.reserved,
        "fit": column.fit,
        "prefill": _time(column.prefill),
        "decode": _time(column.decode),
    }


def _time(time: Time) -> dict[str, Any]:
    return {"seconds": time.seconds, "part": time.part, "bound": time.bound}
